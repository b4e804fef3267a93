"""Fine-tuning: conversations in, answers learned, with all weights (SFT) or with small factors beside them (LoRA).

``chat``      conversations out of JSON Lines, as spans of text to read and spans to answer
``prepare``   ``make data-chat``: a data set of them
``packing``   which conversations share a sequence
``dataset``   what upstream's ``--sft`` path reads
``arguments`` LoRA's arguments beside upstream's own
``lora``      adapters beside upstream's linear layers, under tensor parallelism too
``adapters``  their file, and what of a model a checkpoint holds
``export``    adapters in PEFT's format, and merged into the weights
"""
