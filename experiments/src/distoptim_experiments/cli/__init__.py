"""The subcommands that the experiments add to `distoptim`, by entry points of `distoptim.commands`."""
