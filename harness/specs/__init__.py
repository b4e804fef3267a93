"""Layer specs of our own, for what upstream has no argument for: ``--spec harness.specs.<module>
layer_spec``."""
