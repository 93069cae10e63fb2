"""How bytes travel between real peers."""
