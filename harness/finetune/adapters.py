"""Adapters apart from their model: what of it a checkpoint holds, and their own file.

A run that starts from weights keeps checkpoints of adapters and their optimizer state alone; it
resumes from the weights and those. Beside them lies, for one process and no process group:

adapters/adapters.safetensors  lora_A [r, in] and lora_B [out, r] of each layer, whole, in
                               upstream's names and order of rows
adapters/adapters.json         rank, alpha, targets, what they were trained on top of, and the step
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import UserError
from harness.experiment.model import COLUMN_PARALLEL, Lora
from harness.system.files import sync_file, write_json

FOLDER, TENSORS, RECORD = "adapters", "adapters.safetensors", "adapters.json"
KEY = "decoder.layers.{layer}.{parent}.{name}.{factor}"
PARENTS = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}
"""Where in a layer upstream keeps its linear layers."""
PREFIX = "lora_"
"""What the adapters' names begin with in a model."""


class Adapters(BaseModel):
    """adapters.json. ``base``: the checkpoint's folder that they belong to; ``iteration``: training
    steps they have had."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    lora: Lora
    base: str | None
    iteration: int


class Holding:
    """Which part of the models' parameters goes into checkpoints, and comes out of them: adapters,
    or all but them."""

    def __init__(self, chunks: Sequence) -> None:
        self._adapters = True
        for chunk in chunks:
            self._divide(chunk)

    @contextlib.contextmanager
    def the_base(self) -> Iterator[None]:
        """In this context, checkpoints hold everything but the adapters."""
        self._adapters = False
        try:
            yield
        finally:
            self._adapters = True

    def _held(self, name: str) -> bool:
        return (f".{PREFIX}" in name) == self._adapters

    def _divide(self, chunk) -> None:
        sharded_state_dict, load_state_dict = chunk.sharded_state_dict, chunk.load_state_dict

        def held_part(*args, **kwargs) -> dict:
            return {
                name: value
                for name, value in sharded_state_dict(*args, **kwargs).items()
                if self._held(name)
            }

        def load_part(state: Mapping, strict: bool = True):
            result = load_state_dict(state, strict=False)
            missing = [
                name
                for name in result.missing_keys
                if self._held(name) and not name.endswith("_extra_state")
            ]
            if strict and (missing or result.unexpected_keys):
                raise UserError(
                    f"the checkpoint does not fit: missing {missing[:3]}, unknown"
                    f" {result.unexpected_keys[:3]}"
                )
            return result

        chunk.sharded_state_dict, chunk.load_state_dict = held_part, load_part


def write(adapters: Sequence, folder: Path, base: str | None, iteration: int) -> None:
    """Gather the adapters of all ranks and write them into ``folder`` on rank 0; every rank must
    call it.

    Args:
        adapters: this rank's, see ``lora.attach``.
    """
    import torch
    from megatron.core import parallel_state as state

    first_copy = state.get_data_parallel_rank(with_context_parallel=True) == 0
    mine = (
        {(a.layer, a.name): (a.lora_A.detach().cpu(), a.lora_B.detach().cpu()) for a in adapters}
        if first_copy
        else {}
    )
    told = (state.get_tensor_model_parallel_rank(), mine)
    heard: list = (
        [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
    )
    torch.distributed.gather_object(told, heard)
    if heard is None:
        return
    parts: dict = {}
    for _, theirs in sorted(heard, key=lambda rank: rank[0]):
        for place, factors in theirs.items():
            parts.setdefault(place, []).append(factors)
    gated = {adapter.name for adapter in adapters if adapter.gated}
    whole = {
        place: _joined(place[1], factors, place[1] in gated)
        for place, factors in sorted(parts.items())
    }
    save(whole, folder, Adapters(lora=adapters[0].lora, base=base, iteration=iteration))


def save(factors: Mapping, folder: Path, record: Adapters) -> None:
    """Write ``(layer, name) -> (A, B)`` and ``record``; the record last, so that it never speaks of
    older tensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    named = {
        KEY.format(layer=layer, parent=PARENTS[name], name=name, factor=factor): tensor.contiguous()
        for (layer, name), pair in factors.items()
        for factor, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    part = folder / f".{TENSORS}.part"
    save_file(named, part, metadata={"format": "pt"})
    sync_file(part)
    part.replace(folder / TENSORS)
    write_json(folder / RECORD, record.model_dump(mode="json"))


def read_record(folder: Path) -> Adapters | None:
    """The record in ``folder``; None where there are no adapters.

    Raises:
        UserError: it is damaged, or its tensors are missing.
    """
    try:
        record = Adapters.model_validate_json((folder / RECORD).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise UserError(f"{folder / RECORD} is damaged: {error.errors()[0]['msg']}") from None
    if not (folder / TENSORS).is_file():
        raise UserError(f"{folder} has no {TENSORS}")
    return record


def _joined(name: str, parts: Sequence, gated: bool) -> tuple:
    """The whole factors out of those of the tensor-parallel ranks."""
    import torch

    if name not in COLUMN_PARALLEL:
        return torch.cat([a for a, _ in parts], 1), parts[0][1]
    if gated:  # every rank has rows of the gate, then rows of up
        halves = [b.chunk(2) for _, b in parts]
        return parts[0][0], torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return parts[0][0], torch.cat([b for _, b in parts])
