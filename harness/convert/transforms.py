"""Transforms between a tensor of Megatron-LM and tensors of Hugging Face, inverse bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.experiment.model import Model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """A model's sizes.

    Attributes:
        positions: maximum sequence length.
        vocabulary: rows in Megatron-LM, with padding.
    """

    model: Model
    positions: int
    vocabulary: int

    def shape(self, dimensions: Sequence[str]) -> tuple[int, ...]:
        """The sizes of ``dimensions``, such as ``("gated", "hidden")``."""
        m = self.model
        known = {
            "hidden": m.hidden_size,
            "positions": self.positions,
            "vocabulary": self.vocabulary,
            "heads": m.num_attention_heads,
            "queries": m.query_size,
            "keys": m.key_size,
            "qkv": m.query_size + 2 * m.key_size,
            "ffn": m.ffn,
            "gated": 2 * m.ffn,
            "experts": m.num_experts,
            "expert": m.moe_ffn,
            "gated expert": 2 * m.moe_ffn,
        }
        return tuple(known[name] for name in dimensions)


@dataclass(frozen=True)
class Transform:
    """A function and its inverse.

    Attributes:
        says: its line in docs/weights.md.
        join: tensors of Hugging Face -> Megatron-LM's tensor.
        split: Megatron-LM's tensor -> tensors of Hugging Face; also on the meta device, for shapes.
    """

    name: str
    says: str
    join: Callable[[Sequence[Tensor], Sizes], Tensor]
    split: Callable[[Tensor, Sizes], Sequence[Tensor]]


def _join_qkv(parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
    """q [heads x head, …], k and v [groups x head, …] -> [groups x (queries of a group, key,
    value), …]."""
    return _stacked([part.unflatten(0, (sizes.model.key_heads, -1)) for part in parts], 1).flatten(
        0, 1
    )


def _split_qkv(whole: Tensor, sizes: Sizes) -> list[Tensor]:
    groups = sizes.model.key_heads
    rows = [sizes.model.query_size // groups, sizes.model.head_size, sizes.model.head_size]
    return [part.flatten(0, 1) for part in whole.unflatten(0, (groups, -1)).split(rows, 1)]


def _join_fused_qkv(parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
    """GPT-2's c_attn: weight [hidden, q k v] or bias [q k v]."""
    queries, keys = sizes.shape(("queries", "keys"))
    return _join_qkv(parts[0].t().split([queries, keys, keys]), sizes)


def _split_fused_qkv(whole: Tensor, sizes: Sizes) -> list[Tensor]:
    return [_stacked(_split_qkv(whole, sizes)).t()]


def _join_interleaved(parts: Sequence[Tensor], sizes: Sizes) -> Tensor:
    """GPT-OSS's gate_up_proj: weight [hidden, g u g u …] or bias [g u g u …] -> [g g … u u …,
    hidden]."""
    return parts[0].t().unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)


def _split_interleaved(whole: Tensor, sizes: Sizes) -> list[Tensor]:
    return [whole.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1).t()]


def padded(vocabulary: Tensor, rows: int) -> Tensor:
    """``vocabulary`` [v, hidden] padded to ``rows``; each added row is the mean of the others.

    A padded row belongs to no token, but its logit takes part in the softmax. The logit of the mean
    row is the mean of all logits, and exp is convex. So n such rows add at most n / v to the
    softmax's denominator (Jensen): the loss changes by less than log(1 + n / v) for any weights.
    Rows of zeros would have the logit 0, which dominates if a model's logits are far below zero, as
    GPT-2's are.
    """
    import torch

    if not (missing := rows - len(vocabulary)):
        return vocabulary
    mean = vocabulary.mean(0, dtype=torch.float32, keepdim=True).to(vocabulary.dtype)
    return _stacked([vocabulary, mean.expand(missing, -1)])


def _stacked(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    import torch

    return torch.cat(list(parts), axis)


SAME = Transform("same", "as it is", lambda parts, sizes: parts[0], lambda whole, sizes: [whole])
TRANSPOSED = Transform(
    "transposed", "transposed", lambda parts, sizes: parts[0].t(), lambda whole, sizes: [whole.t()]
)
QKV = Transform(
    "qkv", "rows by query group: its queries, its key, its value", _join_qkv, _split_qkv
)
FUSED_QKV = Transform(
    "fused qkv",
    "transposed, cut into q, k and v; then rows by head: its query, its key, its value",
    _join_fused_qkv,
    _split_fused_qkv,
)
GATE_UP = Transform(
    "gate, up",
    "all rows of the gate, then all rows of up",
    lambda parts, sizes: _stacked(parts),
    lambda whole, sizes: whole.chunk(2),
)
INTERLEAVED_GATE_UP = Transform(
    "interleaved gate, up",
    "transposed; then the even rows (gate), then the odd rows (up)",
    _join_interleaved,
    _split_interleaved,
)
VOCABULARY = Transform(
    "vocabulary",
    "rows added up to a multiple of 128 x TP, each the mean of all; cut off on export",
    lambda parts, sizes: padded(parts[0], sizes.vocabulary),
    lambda whole, sizes: [whole[: sizes.model.vocab_size]],
)
TRANSFORMS = {
    transform.name: transform
    for transform in (
        SAME,
        TRANSPOSED,
        QKV,
        FUSED_QKV,
        GATE_UP,
        INTERLEAVED_GATE_UP,
        VOCABULARY,
    )
}
