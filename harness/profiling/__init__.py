"""Where the time of a step goes: Kineto traces, read and summed up by category."""
