"""The operating system underneath: files that appear whole, locks, processes, terminals, secrets
kept out of print."""
