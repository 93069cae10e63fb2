"""Who talks to whom in which round, and with which weights."""
