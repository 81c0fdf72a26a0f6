"""Published models behind the contracts: their layouts, and how to read a configuration off a file."""
