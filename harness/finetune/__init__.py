"""Fine-tuning on the answers of conversations: of all weights (SFT), or of adapters (LoRA).

``packing``   packs conversations into sequences
``dataset``   packed conversations for upstream's ``--sft`` path
``arguments`` LoRA's command-line arguments
``lora``      adapters of upstream's linear layers, also under tensor parallelism
``adapters``  their files, and which part of a model a checkpoint holds
"""
