"""A federation of local processes, with faults injected."""
