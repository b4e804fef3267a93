"""The rendezvous of a run's launchers, one a node: they connect, compare what each would run, and
tell each other how their part ended."""
