"""What a run leaves behind: events, checkpoints, tables, reports."""
