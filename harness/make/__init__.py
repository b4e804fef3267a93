"""What ``make`` offers: the generated rules, and the target names of the tutorials."""
