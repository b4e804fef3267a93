"""Whole fp32 weights in checkpoints of upstream's precision-aware optimizer.

Transformer Engine's Adam keeps only the 16 bits of an fp32 weight that the bf16 weight lacks
(AdamFunctorMasterParamRemainder in its common/multi_tensor/adam.cu). In fully reshardable
checkpoints upstream writes these bits as if they were the weight, and cannot load them again
(NVIDIA/Megatron-LM pull request 4222).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def install() -> None:
    """Have upstream's distributed optimizer save and load whole weights.

    Without remainders nothing changes.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer as Sharded

    get, put = (
        Sharded._get_main_param_and_optimizer_states,
        Sharded._set_main_param_and_optimizer_states,
    )

    def get_whole(self, model_param) -> dict:
        tensors = get(self, model_param)
        if tensors["param"].dtype == torch.int16:
            tensors["param"] = joined(_shard(self, model_param), tensors["param"])
        return tensors

    def put_parts(self, model_param, tensors: Mapping) -> None:
        weight = _shard(self, model_param)
        remainders = (
            getattr(self.optimizer, "store_param_remainders", False)
            and weight.dtype == torch.bfloat16
        )
        if remainders and tensors["param"].dtype == torch.float32:
            rounded, rest = split(tensors["param"])
            weight.data.copy_(rounded)
            tensors = {**tensors, "param": rest}
        put(self, model_param, tensors)

    Sharded._get_main_param_and_optimizer_states = get_whole
    Sharded._set_main_param_and_optimizer_states = put_parts


def joined(rounded: Tensor, rest: Tensor) -> Tensor:
    """fp32 weights [n] from bf16 weights [n] and int16 remainders [n].

    A remainder is negative where bf16 was rounded up.
    """
    return (rounded.detach().view(torch.int16).int() * 2**16 + rest.int()).view(torch.float32)


def split(whole: Tensor) -> tuple[Tensor, Tensor]:
    """The reverse of ``joined``: bf16 weights, halves rounded away from zero, and remainders."""
    bits = whole.view(torch.int32)
    rounded = (bits + 2**15) >> 16
    return rounded.short().view(torch.bfloat16), (bits - rounded * 2**16).short()


def _shard(optimizer, model_param) -> Tensor:
    """A view of this rank's shard of ``model_param``."""
    group, place = optimizer.model_param_group_index_map[model_param]
    return optimizer.optimizer.param_groups[group]["params"][place]
