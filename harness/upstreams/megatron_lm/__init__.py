"""The interface to Megatron-LM: its arguments, environment variables, and logging to W&B."""
