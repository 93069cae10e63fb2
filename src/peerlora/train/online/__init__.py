"""Flow policies that clients fine-tune online, each in its own environment; a reconstruction, formulas ours."""
