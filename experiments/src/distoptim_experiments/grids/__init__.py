"""The grids that come with the package, as TOML."""
