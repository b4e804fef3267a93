"""Adapters on their way out: merged into the weights, or as PEFT keeps them.

Merging: W + alpha / r B A, summed in fp32 and rounded once to the weight's own precision.

PEFT adapts each of Hugging Face's layers; upstream joins some. The adapter of a joined layer
becomes one of each part: with all of A, and with its rows of B. That is exact; the other way it is
not, since PEFT's adapters of the parts have an A each.
"""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path

from torch import Tensor

from harness.convert import arguments, torch_dist
from harness.convert.architectures import EMBEDDING, LAYERS, Row, architecture_of
from harness.convert.torch_dist import Checkpoint
from harness.convert.transforms import FUSED_QKV, TRANSPOSED, Sizes
from harness.errors import UserError
from harness.finetune.adapters import KEY, PARENTS, TENSORS, Adapters, read_record
from harness.system.files import sync_folder, sync_tree, write_json

_FAN_IN_FAN_OUT = (FUSED_QKV, TRANSPOSED)
"""Transforms of weights that Hugging Face keeps as [in, out]."""


class Factors:
    """The adapters in a folder, as a run leaves them.

    Raises:
        UserError: there are none, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        record = read_record(folder)
        if record is None:
            raise UserError(f"{folder} has no adapters")
        self.record: Adapters = record
        self.folder = folder
        try:
            self._tensors = load_file(folder / TENSORS)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / TENSORS} is damaged: {error}") from None

    def of(self, key: str, index: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] beside the weight ``key`` of upstream's checkpoints, in layer
        ``index``; None without."""
        for name, parent in PARENTS.items():
            if key == f"{LAYERS}{parent}.{name}.weight":
                keys = [
                    KEY.format(layer=index[0], parent=parent, name=name, factor=f)
                    for f in ("lora_A", "lora_B")
                ]
                return tuple(self._tensors[k] for k in keys) if keys[0] in self._tensors else None
        return None


class Merged(Checkpoint):
    """A checkpoint whose tensors are read with the adapters in them."""

    def __init__(self, folder: Path, factors: Factors) -> None:
        super().__init__(folder)
        self._factors = factors

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """As ``Checkpoint.read``.

        Raises:
            UserError: the adapters were trained beside weights of another shape.
        """
        weight = super().read(key, index)
        if (pair := self._factors.of(key, index)) is None:
            return weight
        a, b = (factor.float() for factor in pair)
        if weight.shape != (len(b), a.shape[1]):
            raise UserError(
                f"{self._factors.folder}: adapters for {len(b)} x {a.shape[1]}, but {key} in"
                f" {self.folder} is {' x '.join(map(str, weight.shape))}: they belong to other"
                " weights"
            )
        return (weight.float() + self._factors.record.lora.scale * (b @ a)).to(weight.dtype)


def export_peft(adapters: Path, base: Path, target: Path, named: str) -> int:
    """Write the adapters in a folder as PEFT's into ``target``, whole or not at all; returns how
    many parameters they are.

    Args:
        base: the checkpoint that they stand beside.
        named: what adapter_config.json calls it: a folder or repository of Hugging Face's.

    Raises:
        UserError: adapters or checkpoint are missing or damaged, or no architecture of Hugging Face
        has such layers.
    """
    from safetensors.torch import save_file

    factors = Factors(adapters)
    arguments.register_safe_globals()
    checkpoint = Checkpoint(torch_dist.latest(base))
    args: Namespace = checkpoint.common().get("args") or Namespace()
    rows = checkpoint.shapes[EMBEDDING][0]
    model, positions = arguments.model_of(args, base.name, rows)
    sizes = Sizes(model, positions, rows)
    tensors: dict[str, Tensor] = {}
    targets: dict[str, bool] = {}
    for row in architecture_of(model).rows_of(model):
        for index in row.places(sizes):
            if pair := factors.of(row.megatron, index):
                tensors |= _as_peft(row, index, pair, sizes)
                layers = [name.rpartition("{layer}.")[2].removesuffix(".weight") for name in row.hf]
                targets |= dict.fromkeys(layers, row.how in _FAN_IN_FAN_OUT)
    lora = factors.record.lora
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        save_file(tensors, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(
            unfinished / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": named,
                "r": lora.rank,
                "lora_alpha": lora.alpha,
                "lora_dropout": lora.dropout,
                "target_modules": sorted(targets),
                "fan_in_fan_out": any(targets.values()),
                "bias": "none",
                "inference_mode": True,
            },
        )
        sync_tree(unfinished)
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return sum(tensor.numel() for tensor in tensors.values())


def _as_peft(
    row: Row, index: tuple[int, ...], pair: tuple[Tensor, Tensor], sizes: Sizes
) -> dict[str, Tensor]:
    """PEFT's tensors for the layers that the weight ``row`` is made of."""
    a, b = pair
    parts = row.how.split(b, sizes)
    parts = [part.t() for part in parts] if row.how in _FAN_IN_FAN_OUT else parts
    named = [f"base_model.model.{name.removesuffix('.weight')}" for name in row.names(index)]
    return {f"{name}.lora_A.weight": a.clone() for name in named} | {
        f"{name}.lora_B.weight": part.contiguous().clone()
        for name, part in zip(named, parts, strict=True)
    }
