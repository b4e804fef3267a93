"""Exports a checkpoint of Megatron-LM to a folder for ``from_pretrained``, tensor by tensor."""

from __future__ import annotations

import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from harness import ROOT
from harness.convert import arguments, hub, torch_dist, weights
from harness.convert.adapters import Factors, Merged
from harness.convert.architectures import (
    EMBEDDING,
    LM_HEAD,
    Architecture,
    TensorRow,
    architecture_of,
)
from harness.convert.folders import complete_folder
from harness.convert.safetensor_files import SHARD_BYTES, sliced, writing
from harness.convert.torch_dist import TorchDistCheckpoint
from harness.convert.transforms import Sizes
from harness.errors import UserError


@dataclass(frozen=True)
class Exported:
    """The result of an export. ``tokenizer``: the folder that its files are from, if any."""

    architecture: str
    parameters: int
    bytes: int
    files: int
    tokenizer: Path | None


def export_checkpoint(
    folder: Path,
    target: Path,
    *,
    like: Path | None = None,
    adapters: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write the checkpoint in ``folder`` as a Hugging Face model to ``target``, completely or not.

    Args:
        folder: one of upstream's save folders, or a checkpoint in it, or a folder of weights/.
        like: a Hugging Face folder whose vocabulary size, token ids and tokenizer the model keeps;
            by default that of the weights that the run started from.
        adapters: a folder of LoRA's adapters to merge into the weights.

    Raises:
        UserError: there is no whole checkpoint, the adapters do not fit, or no architecture of
            Hugging Face has these weights.
    """
    found = torch_dist.latest(folder)
    arguments.register_safe_globals()
    checkpoint = Merged(found, Factors(adapters)) if adapters else TorchDistCheckpoint(found)
    args: Namespace = checkpoint.common().get("args") or Namespace()
    origin = like or _origin(folder, args)
    tokenizer = _tokenizer(origin, args)
    kept = hub.read_config(origin)[1] if origin and (origin / hub.CONFIG).exists() else {}
    rows = checkpoint.shapes.get(EMBEDDING, (0,))[0]
    vocab_size = kept.get("vocab_size") or _vocab_size(tokenizer, args) or rows
    model, positions = arguments.model_of(args, folder.name, vocab_size)
    architecture = architecture_of(model)
    if kept and kept["model_type"] != architecture.model_type:
        raise UserError(f"{origin} is a {kept['model_type']}, {folder} a {architecture.model_type}")
    sizes = Sizes(model, positions, rows)
    keys = _check(checkpoint, architecture, sizes)
    announced = _announced(checkpoint, architecture, sizes, keys)
    with complete_folder(target) as unfinished:
        with writing(unfinished, announced, shard_bytes) as writer:
            for row, key in keys.items():
                for index in row.places(sizes):
                    parts = row.how.split(checkpoint.read(key, index), sizes)
                    for name, part in zip(row.names(index), parts, strict=True):
                        writer.write(name, part)
        dtype = checkpoint.dtypes[next(iter(keys.values()))]
        said = kept | architecture.write(model, positions)
        _write_config(unfinished, said, dtype)
        for name in (*hub.TOKENIZER, "generation_config.json"):
            source = tokenizer if name in hub.TOKENIZER else origin
            if source and (source / name).is_file():
                shutil.copyfile(source / name, unfinished / name)
    numbers = {name: torch.Size(shape).numel() for name, (_, shape) in announced.items()}
    return Exported(
        architecture.name,
        sum(numbers.values()),
        sum(numbers[name] * dtype.itemsize for name, (dtype, _) in announced.items()),
        len(list(target.glob("*.safetensors"))),
        tokenizer,
    )


def _origin(folder: Path, args: Namespace) -> Path | None:
    """The Hugging Face files of imported weights: ``folder``, or those that its run began with."""
    starts = (getattr(args, key, None) for key in ("pretrained_checkpoint", "load"))
    candidates = [folder, folder.parent, *(ROOT / start for start in starts if start)]
    return next((c / weights.HF for c in candidates if weights.read(c)), None)


def _tokenizer(origin: Path | None, args: Namespace) -> Path | None:
    """The folder with the tokenizer's files: the run's own, else the origin's."""
    own = Path(args.tokenizer_model) if getattr(args, "tokenizer_model", None) else None
    if own and own.is_file():
        own = own.parent
    return next(
        (place for place in (own, origin) if place and (place / "tokenizer.json").is_file()), None
    )


def _vocab_size(tokenizer: Path | None, args: Namespace) -> int | None:
    """The vocabulary size of the run, as upstream counts it."""
    if tokenizer and (vocabulary := hub.vocabulary_of(tokenizer)):
        return max(vocabulary.values()) + 1
    stated = getattr(args, "vocab_size", None)
    return (
        stated + 1
        if stated and getattr(args, "tokenizer_type", None) == "NullTokenizer"
        else stated
    )


def _check(
    checkpoint: TorchDistCheckpoint, architecture: Architecture, sizes: Sizes
) -> dict[TensorRow, str]:
    """The checkpoint's key of every row.

    Raises:
        UserError: one is missing, or its shape contradicts the arguments.
    """
    keys: dict[TensorRow, str] = {}
    for row in architecture.rows_of(sizes.model):
        key = next((key for key in (row.megatron, *row.also) if key in checkpoint.shapes), None)
        if key is None:
            raise UserError(
                f"{checkpoint.folder} has no {row.megatron}, which every {architecture.name} has"
            )
        shape = (*row.stacked(sizes), *sizes.shape(row.shape))
        if checkpoint.shapes[key] != shape:
            raise UserError(
                f"{checkpoint.folder}: {key} is {list(checkpoint.shapes[key])}, "
                f"its arguments say {list(shape)}"
            )
        keys[row] = key
    if sizes.vocabulary < sizes.model.vocab_size:
        raise UserError(
            f"{checkpoint.folder} has {sizes.vocabulary:,} tokens, fewer than the"
            f" {sizes.model.vocab_size:,} of its tokenizer or of HF="
        )
    return keys


def _announced(
    checkpoint: TorchDistCheckpoint,
    architecture: Architecture,
    sizes: Sizes,
    keys: dict[TensorRow, str],
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor to write, by Hugging Face's name, in the order of layers."""
    found = {}
    for row, key in keys.items():
        parts = row.how.split(torch.empty(sizes.shape(row.shape), device="meta"), sizes)
        for index in row.places(sizes):
            for name, part in zip(row.names(index), parts, strict=True):
                whole, expert = sliced(name)
                shape = (
                    tuple(part.shape) if expert is None else (sizes.model.num_experts, *part.shape)
                )
                found[whole] = index[:1], (checkpoint.dtypes[key], shape)
    last = (LM_HEAD, "model.norm.weight", "transformer.ln_f.weight", "transformer.ln_f.bias")
    order = sorted(found, key=lambda name: (name in last, *(found[name][0] or (-1,))))
    return {name: found[name][1] for name in order}


def _write_config(folder: Path, said: dict[str, Any], dtype: torch.dtype) -> None:
    """Write config.json with the keys ``said``, which may be the origin's."""
    from transformers import AutoConfig

    # Exported weights are no longer MXFP4, and lie in another folder than the origin.
    dropped = ("quantization_config", "_name_or_path")
    kept = {key: value for key, value in said.items() if key not in dropped}
    kept["dtype"] = str(dtype).removeprefix("torch.")
    AutoConfig.for_model(**kept).save_pretrained(folder)
