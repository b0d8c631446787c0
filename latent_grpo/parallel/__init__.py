"""Several processes: the process group, the sharded model, and the division of work among the ranks."""
