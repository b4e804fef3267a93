"""What this machine has for runs: GPUs, packages, Megatron-LM; and how it is brought there."""
