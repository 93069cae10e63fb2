"""Communication of real peers: messages, transports and identities."""
