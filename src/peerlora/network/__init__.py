"""Real peers: messages, bytes, and who is who."""
