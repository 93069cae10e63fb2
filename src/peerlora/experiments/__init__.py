"""Many runs: grids, statistics, tables and published numbers."""
