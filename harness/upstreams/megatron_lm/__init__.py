"""How Megatron-LM is spoken to: its arguments, its environment variables, its log to Weights &
Biases."""
