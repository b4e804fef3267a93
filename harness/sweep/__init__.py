"""Many set-ups of one row: which are worth a run, in which order, and what they measured."""
