"""A run while it goes on: its events as they are written, and a page that shows them."""
