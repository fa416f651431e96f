"""Grids of runs described by one TOML file, resumable: what `distoptim reproduce` runs."""
