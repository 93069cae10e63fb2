"""How a config becomes a run: plan, load, assemble, and the loop over rounds."""
