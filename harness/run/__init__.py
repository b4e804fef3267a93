"""What a run leaves: its directory, typed records, checkpoints, statistics of its metrics."""
