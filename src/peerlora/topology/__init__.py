"""Who talks to whom in a round, and with which weight."""
