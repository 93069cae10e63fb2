"""Experiment trackers that show a run's numbers while it goes on; they read events, like every sink."""
