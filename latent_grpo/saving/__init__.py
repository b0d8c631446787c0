"""Files that survive a kill: checkpoints, sharded tensors, atomic writes."""
