"""Fine-tuning on answers: with all weights (SFT) or with small factors beside them (LoRA).

``packing``   which conversations share a sequence
``dataset``   what upstream's ``--sft`` path reads
``arguments`` LoRA's arguments beside upstream's own
``lora``      adapters beside upstream's linear layers, under tensor parallelism too
``adapters``  their file, and what of a model a checkpoint holds
"""
