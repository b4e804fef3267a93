"""The operating system: atomic files, locks, processes, terminals, and masking of secrets."""
