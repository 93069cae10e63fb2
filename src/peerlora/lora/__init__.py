"""What an adapter and a base model are."""
