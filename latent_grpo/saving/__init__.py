"""What a run leaves on the disk, whole even if it is killed: checkpoints, model folders, single files."""
