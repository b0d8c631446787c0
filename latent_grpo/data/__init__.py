"""Training rows and benchmarks, from files and from the Hub."""
