"""The any-order transformer and its parts."""
