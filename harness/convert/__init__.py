"""Converts weights between Hugging Face's safetensors and Megatron-LM's ``torch_dist`` checkpoints.

``architectures``     the supported ones: a table each, read in both directions
``transforms``        how tensors of the one format become a tensor of the other
``safetensor_files``  Hugging Face's files
``torch_dist``        Megatron-LM's checkpoints
``weights``           weights/<name>/, the result of an import
``hub``               finds or downloads a model's folder
``importing``, ``exporting``
``adapters``          LoRA's adapters, merged into the weights or exported for PEFT
"""
