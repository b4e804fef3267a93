"""What an experiment is: its rows as validated values, and what follows from its sizes alone."""
