"""What this machine can do, measured: products, attention, memory, launches, links and disk."""
