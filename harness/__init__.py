"""Run, understand and tune Megatron-LM: the package behind the Makefile's targets."""
