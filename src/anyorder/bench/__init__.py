"""Benchmarks: measured times and memory as shares of what the machine can do."""
