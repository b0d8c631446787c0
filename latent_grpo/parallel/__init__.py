"""Several processes: the process group, sharded models, and who computes what."""
