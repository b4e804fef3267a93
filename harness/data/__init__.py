"""From raw text to the .bin/.idx that Megatron-LM trains on: where text comes from, cleaning,
tokenising, checks."""
