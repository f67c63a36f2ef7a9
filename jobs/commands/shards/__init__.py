"""The subcommands of `coatnet shards`."""
