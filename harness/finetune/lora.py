"""LoRA: low-rank adapters of frozen linear layers, y = W x + alpha / r B A x.

Source: Hu et al. 2021, arXiv:2106.09685. Under tensor parallelism on t ranks one factor is sharded
like the weight, and the other one is replicated (r: rank of the adapter; out, in: the weight's):

    linear_qkv, linear_fc1   rows are sharded      A [r, in] replicated   B [out/t, r] sharded
    linear_proj, linear_fc2  columns are sharded   A [r, in/t] sharded    B [out, r] replicated

Communication is r wide. With sequence parallelism a replicated factor sees only a part of the
sequence on each rank. It is marked as upstream marks norms, so that ``finalize_model_grads`` sums
its gradients over the ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import math

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from torch import Tensor
from torch.nn import functional

from harness.experiment.model import COLUMN_PARALLEL, Lora
from harness.finetune.adapters import PARENTS, PREFIX


class Adapter(torch.nn.Module):
    """Two factors of one linear layer: ``lora_A`` [r, in], ``lora_B`` [out, r], or their shards.

    A starts uniform like PEFT's and ``torch.nn.Linear``'s (Kaiming with a = sqrt(5)), B with zeros,
    so that training starts from the frozen model's output. The values of A depend on the seed, the
    layer and the name, but not on the layout.

    Args:
        parent: upstream's attention or MLP with the linear layer ``name``.
        layer: number of the transformer layer, from 0.
    """

    def __init__(
        self, parent: torch.nn.Module, name: str, layer: int, lora: Lora, seed: int
    ) -> None:
        super().__init__()
        config, group = parent.config, parent.tp_group
        linear = getattr(parent, name)
        self.name, self.layer, self.lora, self.config, self.group = name, layer, lora, config, group
        self.splits_rows = name in COLUMN_PARALLEL
        self.gated = name == "linear_fc1" and config.gated_linear_unit
        weight = linear.weight
        rows, columns = weight.shape
        width = columns if self.splits_rows else columns * group.size()
        whole = first_factor(seed, layer, name, lora.rank, width)
        mine = whole if self.splits_rows else whole.chunk(group.size(), 1)[group.rank()]
        self.lora_A = torch.nn.Parameter(
            mine.to(weight.device, weight.dtype, copy=True).contiguous()
        )
        self.lora_B = torch.nn.Parameter(
            torch.zeros(rows, lora.rank, dtype=weight.dtype, device=weight.device)
        )
        part, whole_one = (
            (self.lora_B, self.lora_A) if self.splits_rows else (self.lora_A, self.lora_B)
        )
        tensor_parallel.set_tensor_model_parallel_attributes(
            part, True, 0 if self.splits_rows else 1, 1
        )
        whole_one.sequence_parallel = config.sequence_parallel
        self._norm = _norm_within(linear, config)

    def forward(self, hidden: Tensor) -> Tensor:
        """The adapter's contribution to the layer's output.

        Args:
            hidden: the layer's input [s, b, in], or this rank's shard of it.
        """
        if self._norm:
            hidden = self._norm(hidden)
        with self._own_randomness():
            hidden = functional.dropout(hidden, self.lora.dropout, self.training)
        low = functional.linear(hidden, self.lora_A)
        sequence_parallel = self.config.sequence_parallel
        if self.splits_rows:
            low = (
                gather_from_sequence_parallel_region(
                    low, tensor_parallel_output_grad=True, group=self.group
                )
                if sequence_parallel
                else copy_to_tensor_model_parallel_region(low, group=self.group)
            )
        else:
            low = (
                reduce_scatter_to_sequence_parallel_region(low, group=self.group)
                if sequence_parallel
                else reduce_from_tensor_model_parallel_region(low, group=self.group)
            )
        return functional.linear(low, self.lora_B) * self.lora.scale

    def _own_randomness(self) -> contextlib.AbstractContextManager:
        """A different random generator on each tensor-parallel rank if their inputs are shards."""
        sharded = not self.splits_rows or self.config.sequence_parallel
        return (
            tensor_parallel.get_cuda_rng_tracker().fork()
            if sharded and self.lora.dropout
            else contextlib.nullcontext()
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        """Both factors in upstream's format for checkpoints that load under any layout."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = {"tp_group": self.group, "dp_cp_group": metadata["dp_cp_group"]}
        split = {"lora_B": 0} if self.splits_rows else {"lora_A": 1}
        found = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, split, sharded_offsets, **groups
        )
        if self.gated:
            found[f"{prefix}lora_B"] = apply_swiglu_sharded_factory(
                found[f"{prefix}lora_B"],
                sharded_offsets,
                metadata.get("singleton_local_shards", False),
                tp_group=self.group,
                dp_group=metadata["dp_cp_group"],
            )
        return found


def first_factor(seed: int, layer: int, name: str, rank: int, width: int) -> Tensor:
    """The initial A [rank, width]: uniform between +-1 / sqrt(width)."""
    digest = hashlib.sha256(f"{seed} {layer} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    bound = 1 / math.sqrt(width)
    return torch.empty(rank, width).uniform_(-bound, bound, generator=generator)


def attach(chunks: list[torch.nn.Module], lora: Lora, seed: int) -> list[Adapter]:
    """Freeze a model (a chunk for each virtual stage) and add adapters; returns them in order.

    They are children of attention and MLP, not of the linear layers, so that the latter keep their
    checkpoint format.
    """
    found = []
    for chunk in chunks:
        chunk.requires_grad_(False)
        for layer in chunk.decoder.layers:
            for name in lora.targets:
                parent = getattr(layer, PARENTS[name])
                adapter = Adapter(parent, name, layer.layer_number - 1, lora, seed)
                parent.add_module(PREFIX + name, adapter)
                getattr(parent, name).register_forward_hook(_adding(adapter))
                found.append(adapter)
        if chunk.pre_process and chunk.config.recompute_granularity == "full":
            # Recomputation propagates no gradient if no input requires one, and the output of a
            # frozen embedding requires none.
            chunk.embedding.register_forward_hook(
                lambda module, args, output: output.requires_grad_()
            )
    return found


def _adding(adapter: Adapter):
    def add(linear: torch.nn.Module, inputs: tuple, output: tuple) -> tuple:
        return output[0] + adapter(inputs[0]), *output[1:]

    return add


def _norm_within(linear: torch.nn.Module, config):
    """The norm that Transformer Engine fuses into the linear layer; None for other layers."""
    if not hasattr(linear, "layer_norm_weight"):
        return None

    def norm(hidden: Tensor) -> Tensor:
        weight = (
            linear.layer_norm_weight + 1
            if config.layernorm_zero_centered_gamma
            else linear.layer_norm_weight
        )
        if config.normalization == "RMSNorm":
            return functional.rms_norm(hidden, weight.shape, weight, config.layernorm_epsilon)
        return functional.layer_norm(
            hidden, weight.shape, weight, linear.layer_norm_bias, config.layernorm_epsilon
        )

    return norm
