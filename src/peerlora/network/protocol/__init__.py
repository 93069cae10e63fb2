"""The messages of real peers: what a round, a push or a handshake consists of, and every check before use."""
