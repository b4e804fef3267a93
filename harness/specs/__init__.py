"""Layer specs, for models that upstream has no arguments for (``--spec MODULE layer_spec``)."""
