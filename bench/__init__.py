"""Benchmarks of the fused operators: `python -m bench --help`."""
