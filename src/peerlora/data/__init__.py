"""Rows: read, tokenised, divided among clients, put into batches."""
