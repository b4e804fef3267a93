"""Megatron-LM -> Hugging Face: a checkpoint becomes a folder that ``from_pretrained`` opens, tensor
by tensor."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from harness import ROOT
from harness.convert import arguments, hub, torch_dist, weights
from harness.convert.adapters import Factors, Merged
from harness.convert.architectures import EMBEDDING, LM_HEAD, Architecture, Row, architecture_of
from harness.convert.safetensor_files import SHARD_BYTES, sliced, writing
from harness.convert.torch_dist import Checkpoint
from harness.convert.transforms import Sizes
from harness.errors import UserError
from harness.system.files import sync_folder, sync_tree


@dataclass(frozen=True)
class Exported:
    """What was written. ``tokenizer``: where the tokenizer's files came from; none where none was
    found."""

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
    """Write the checkpoint in ``folder`` as a Hugging Face model into ``target``, whole or not at
    all.

    Args:
        folder: one of upstream's save folders, or a checkpoint in it, or a folder of weights/.
        like: a Hugging Face folder whose vocabulary size, token ids and tokenizer the model keeps;
            by default that of the weights that the run started from.
        adapters: a folder of LoRA's adapters, to be merged with the weights.

    Raises:
        UserError: there is no whole checkpoint, the adapters do not fit, or no architecture of
        Hugging Face has its weights.
    """
    found = torch_dist.latest(folder)
    arguments.register_safe_globals()
    checkpoint = Merged(found, Factors(adapters)) if adapters else Checkpoint(found)
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
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        with writing(unfinished, announced, shard_bytes) as writer:
            for row, key in keys.items():
                for index in row.places(sizes):
                    parts = row.how.split(checkpoint.read(key, index), sizes)
                    for name, part in zip(row.names(index), parts, strict=True):
                        writer.write(name, part)
        _write_config(
            unfinished,
            architecture,
            model,
            positions,
            kept,
            checkpoint.dtypes[next(iter(keys.values()))],
        )
        for name in (*hub.TOKENIZER, "generation_config.json"):
            source = (tokenizer if name in hub.TOKENIZER else origin) or Path()
            if source != Path() and (source / name).is_file():
                shutil.copyfile(source / name, unfinished / name)
        sync_tree(unfinished)
        if target.exists():
            target.rmdir()
        unfinished.rename(target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    numbers = {name: torch.Size(shape).numel() for name, (_, shape) in announced.items()}
    return Exported(
        architecture.name,
        sum(numbers.values()),
        sum(numbers[name] * dtype.itemsize for name, (dtype, _) in announced.items()),
        len(list(target.glob("*.safetensors"))),
        tokenizer,
    )


def _origin(folder: Path, args: Namespace) -> Path | None:
    """The Hugging Face files of the weights that ``folder`` is, or that its run started from, where
    they are still there."""
    starts = (getattr(args, key, None) for key in ("pretrained_checkpoint", "load"))
    candidates = [folder, folder.parent, *(ROOT / start for start in starts if start)]
    return next((c / weights.HF for c in candidates if weights.read(c)), None)


def _tokenizer(origin: Path | None, args: Namespace) -> Path | None:
    """The folder with the tokenizer's files: the run's own, else that of the weights it started
    from."""
    own = Path(args.tokenizer_model) if getattr(args, "tokenizer_model", None) else None
    if own and own.is_file():
        own = own.parent
    return next(
        (place for place in (own, origin) if place and (place / "tokenizer.json").is_file()), None
    )


def _vocab_size(tokenizer: Path | None, args: Namespace) -> int | None:
    """How many tokens the run knew, as upstream counts them."""
    if tokenizer and (vocabulary := hub.vocabulary_of(tokenizer)):
        return max(vocabulary.values()) + 1
    stated = getattr(args, "vocab_size", None)
    return (
        stated + 1
        if stated and getattr(args, "tokenizer_type", None) == "NullTokenizer"
        else stated
    )


def _check(checkpoint: Checkpoint, architecture: Architecture, sizes: Sizes) -> dict[Row, str]:
    """The key of every row in the checkpoint.

    Raises:
        UserError: one is missing, or of another shape than the arguments say.
    """
    keys: dict[Row, str] = {}
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
                f"the arguments beside it say {list(shape)}"
            )
        keys[row] = key
    if sizes.vocabulary < sizes.model.vocab_size:
        raise UserError(
            f"{checkpoint.folder} has {sizes.vocabulary:,} tokens, fewer than the"
            f" {sizes.model.vocab_size:,} of its tokenizer or of HF="
        )
    return keys


def _announced(
    checkpoint: Checkpoint, architecture: Architecture, sizes: Sizes, keys: dict[Row, str]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor to write, by Hugging Face's name, in the order of layers."""
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


def _write_config(
    folder: Path, architecture: Architecture, model, positions: int, kept: dict, dtype: torch.dtype
) -> None:
    """config.json: what the origin's said, with everything that concerns the weights as they are
    now."""
    from transformers import AutoConfig

    said = {
        **kept,
        **architecture.write(model, positions),
        "dtype": str(dtype).removeprefix("torch."),
    }
    for key in ("quantization_config", "_name_or_path"):  # MXFP4 no longer; another folder
        said.pop(key, None)
    AutoConfig.for_model(**said).save_pretrained(folder)
