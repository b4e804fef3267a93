"""Where the time of a step goes: PyTorch profiler traces, summed up by category."""
