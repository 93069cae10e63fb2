"""Messages of real peers: rounds, pushes and handshakes, and every check before use."""
