"""Files of LoRA's adapters, and the part of a model that a checkpoint holds.

Checkpoints of a LoRA run hold only adapters and their optimizer state; the run resumes from these
and from the weights that it started from. It also writes, readable without process groups:

adapters/adapters.safetensors  lora_A [r, in] and lora_B [out, r] of each layer, unsharded, with
                               upstream's names and order of rows
adapters/adapters.json         rank, alpha, targets, the base checkpoint, and the step
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
"""Linear layer -> its parent module in upstream's transformer layer."""
PREFIX = "lora_"
"""Prefix of the adapters' names in a model."""


class Adapters(BaseModel):
    """The content of adapters.json.

    Attributes:
        base: folder of the checkpoint that the adapters belong to.
        iteration: training steps.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    lora: Lora
    base: str | None
    iteration: int


class Holding:
    """Selects the parameters that checkpoints save and load: the adapters, or all others."""

    def __init__(self, chunks: Sequence) -> None:
        self._adapters = True
        for chunk in chunks:
            self._divide(chunk)

    @contextlib.contextmanager
    def the_base(self) -> Iterator[None]:
        """A context in which checkpoints hold everything except the adapters."""
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
                    f"the checkpoint does not fit the model: missing {missing[:3]}, unknown"
                    f" {result.unexpected_keys[:3]}"
                )
            return result

        chunk.sharded_state_dict, chunk.load_state_dict = held_part, load_part


def write(adapters: Sequence, folder: Path, base: str | None, iteration: int) -> None:
    """Gather the adapters of all ranks and write them to ``folder`` on rank 0.

    Every rank must call this.

    Args:
        adapters: this rank's, see ``lora.attach``.
    """
    import torch
    from megatron.core import parallel_state as state

    mine = {}
    if state.get_data_parallel_rank(with_context_parallel=True) == 0:
        for adapter in adapters:
            factors = adapter.lora_A.detach().cpu(), adapter.lora_B.detach().cpu()
            mine[adapter.layer, adapter.name] = factors
    on_rank_0 = torch.distributed.get_rank() == 0
    gathered: list | None = [None] * torch.distributed.get_world_size() if on_rank_0 else None
    tp_rank = state.get_tensor_model_parallel_rank()
    torch.distributed.gather_object((tp_rank, mine), gathered)
    if gathered is None:
        return
    shards: dict = {}
    for _, theirs in sorted(gathered, key=lambda rank: rank[0]):
        for place, factors in theirs.items():
            shards.setdefault(place, []).append(factors)
    gated = {adapter.name for adapter in adapters if adapter.gated}
    whole = {
        (layer, name): _joined(name, factors, name in gated)
        for (layer, name), factors in sorted(shards.items())
    }
    save(whole, folder, Adapters(lora=adapters[0].lora, base=base, iteration=iteration))


def save(factors: Mapping, folder: Path, record: Adapters) -> None:
    """Write ``(layer, name) -> (A, B)``, and ``record`` last: it never belongs to older tensors."""
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
    """The record in ``folder``; None if there are no adapters.

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
    """The unsharded factors from those of the tensor-parallel ranks."""
    import torch

    if name not in COLUMN_PARALLEL:
        return torch.cat([a for a, _ in parts], 1), parts[0][1]
    if gated:  # each rank has rows of the gate, then rows of up
        halves = [b.chunk(2) for _, b in parts]
        return parts[0][0], torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return parts[0][0], torch.cat([b for _, b in parts])
