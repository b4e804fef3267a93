"""What a run leaves: its directory and schema, checkpoints, statistics of its metrics."""
