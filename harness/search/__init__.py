"""Every layout of the same work over GPUs: which are legal, which fit, which are fastest."""
