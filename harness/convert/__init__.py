"""Hugging Face weights in and out: safetensors <-> Megatron-LM's ``torch_dist`` checkpoints, tensor
by tensor.

``architectures``  which there are: one table each, read in both directions
``transforms``     how a tensor of the one is made of tensors of the other
``safetensor_files`` files of Hugging Face's format
``torch_dist``     Megatron-LM's checkpoints
``weights``        weights/<name>/, what an import leaves
``hub``            a folder on this machine, or one fetched
``importing``, ``exporting``
``adapters``       LoRA's adapters merged into the weights, or as PEFT keeps them
"""
