"""Converts MXFP4, in which OpenAI publishes GPT-OSS's experts, to bf16, which holds it exactly.

32 numbers of 4 bits share a scale of 8 bits (OCP Microscaling Formats 1.0, sections 5.2 and 5.3).
Megatron-LM has no such weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from harness.convert.safetensor_files import Stored, Tensors, sliced

BLOCKS, SCALES = "_blocks", "_scales"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the 16 codes of E2M1."""
BIAS = 127


def dequantized(blocks: Tensor, scales: Tensor) -> Tensor:
    """bf16 values [rows, columns].

    Args:
        blocks: uint8 [rows, columns / 32, 16], two codes a byte, the low half first.
        scales: uint8 [rows, columns / 32], exponents of 2 plus BIAS.
    """
    values = torch.tensor(VALUES, dtype=torch.bfloat16)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    exponents = (scales.int() - BIAS).unsqueeze(-1)
    return torch.ldexp(values[codes.int()], exponents).flatten(-2)


class Dequantized(Tensors):
    """A folder's tensors, with those in MXFP4 as bf16.

    They get the shape [experts, columns, rows], as in GPT-OSS's unquantised files.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._packed = tensors
        self.quantized = frozenset(
            name.removesuffix(BLOCKS) for name in tensors if name.endswith(BLOCKS)
        )

    def __getitem__(self, name: str) -> Stored:
        whole, index = sliced(name)
        if whole not in self.quantized:
            return self._packed[name]
        blocks = self._packed[whole + BLOCKS]
        experts, rows, groups, half = blocks.shape
        stored = Stored(
            blocks.file, torch.bfloat16, (experts, groups * half * 2, rows), blocks.offset
        )
        return stored if index is None else stored.part(index)

    def __iter__(self) -> Iterator[str]:
        packed = {name + ending for name in self.quantized for ending in (BLOCKS, SCALES)}
        yield from (name for name in self._packed if name not in packed)
        yield from self.quantized

    def __len__(self) -> int:
        return len(self._packed) - len(self.quantized)

    def read(self, name: str) -> Tensor:
        whole, index = sliced(name)
        if whole not in self.quantized:
            return self._packed.read(name)
        at = "" if index is None else f"[{index}]"
        values = dequantized(
            *(self._packed.read(whole + ending + at) for ending in (BLOCKS, SCALES))
        )
        return values.transpose(-1, -2)
