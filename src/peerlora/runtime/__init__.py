"""Where clients live: all in this process, so far."""
