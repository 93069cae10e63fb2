"""Rows, tokens, partitions and batches."""
