"""What one run leaves behind: its folder, events, metrics and report."""
