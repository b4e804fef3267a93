"""The rendezvous of a run's launchers, one a node: they connect, compare what each would run, and
report how their part ended."""
