"""What an adapter is."""
