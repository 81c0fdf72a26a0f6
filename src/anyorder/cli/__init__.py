"""The command `anyorder`."""
