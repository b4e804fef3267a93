"""Imports a Hugging Face model: checks it against config.json, writes a checkpoint by tensors."""

from __future__ import annotations

import shutil
from functools import partial
from math import lcm
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.convert import arguments, hub, torch_dist
from harness.convert.architectures import (
    EMBEDDING,
    EXPERTS,
    LAYERS,
    LM_HEAD,
    Architecture,
    TensorRow,
)
from harness.convert.folders import complete_folder
from harness.convert.mxfp4 import Dequantized
from harness.convert.safetensor_files import FLOATS, Tensors, open_folder
from harness.convert.torch_dist import Piece
from harness.convert.transforms import Sizes
from harness.convert.weights import HF, RECORD, RELEASE, Weights, check_data
from harness.data.data_sets import Blend
from harness.errors import UserError
from harness.run.checkpoints import TRACKER
from harness.system.files import write_json

WIDEST_TP = 8
"""Vocabularies are padded for this many tensor-parallel ranks, and so for smaller powers of 2."""

ALIGNMENT = 128
"""Upstream's --make-vocab-size-divisible-by."""

# Modules with an _extra_state in upstream's layer specs, Transformer Engine's or local. Without fp8
# the state is empty, but upstream's loader insists that a checkpoint has it.
_STATEFUL = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "self_attention.q_layernorm",
    "self_attention.k_layernorm",
    "input_layernorm",
    "pre_mlp_layernorm",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_STATEFUL_EXPERTS = (EXPERTS + "linear_fc1", EXPERTS + "linear_fc2")


def import_folder(
    source: str,
    target: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    data: Blend | None = None,
) -> Weights:
    """Write the weights of Hugging Face's ``source`` to ``target``, completely or not at all.

    Args:
        target: a folder whose name becomes the model's.
        tp, pp, ep: a layout to check the model against; the checkpoint loads under any other too.
        data: data sets to check the tokenizer against.

    Raises:
        UserError: the folder is incomplete, damaged, contradicts its config.json, or is not
            supported.
    """
    name = target.name
    folder = hub.locate(source)
    architecture, config = hub.read_config(folder)
    model, positions = architecture.read(config, name)
    multiple = ALIGNMENT * lcm(tp, WIDEST_TP)
    sizes = Sizes(model, positions, -(-model.vocab_size // multiple) * multiple)
    words = arguments.flags(model, positions, tp, pp, ep)
    tensors = Dequantized(open_folder(folder))
    pieces = plan(architecture, sizes, tensors)
    if not model.untie_embeddings:
        _check_tied(folder, architecture, sizes, tensors)
    if data:
        check_data(model, folder, data)
    has_tokenizer = _check_tokenizer(folder, model.vocab_size)
    used = [
        tensors[name]
        for row in architecture.rows_of(model)
        for index in row.places(sizes)
        for name in _found(architecture, row, index, tensors)
    ]
    weights = Weights(
        name=name,
        source=source,
        architecture=architecture.name,
        model=model,
        positions=positions,
        padded_vocab_size=sizes.vocabulary,
        parameters=sum(t.bytes // t.dtype.itemsize for t in used),
        bytes=sum(t.bytes for t in used),
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in used})),
        dequantized=len(tensors.quantized),
        tokenizer=has_tokenizer,
        flags=tuple(words),
    )
    _check_room(target, weights.bytes)
    # NAME= cannot begin with a dot, so that no weights have the unfinished folder's name.
    with complete_folder(target, replace=True) as unfinished:
        (unfinished / HF).mkdir()
        for kept in hub.KEPT:
            if (folder / kept).is_file():
                shutil.copyfile(folder / kept, unfinished / HF / kept)
        torch_dist.write(
            unfinished / RELEASE, pieces, states(sizes) | {torch_dist.COMMON: _common(words, sizes)}
        )
        (unfinished / TRACKER).write_text("release")
        write_json(unfinished / RECORD, weights.model_dump(mode="json"))
    return weights


def plan(architecture: Architecture, sizes: Sizes, tensors: Tensors) -> list[Piece]:
    """Every piece of the checkpoint, made from ``tensors`` when it is written.

    Raises:
        UserError: tensors are missing, unknown, or of other shapes than config.json says.
    """
    missing, misfits, wanted = [], [], set()
    pieces = []
    for row in architecture.rows_of(sizes.model):
        shape = sizes.shape(row.shape)
        expected = [
            tuple(part.shape) for part in row.how.split(torch.empty(shape, device="meta"), sizes)
        ]
        for index in row.places(sizes):
            names = _found(architecture, row, index, tensors)
            wanted.update(name.partition("[")[0] for name in names)
            absent = [name for name in names if name.partition("[")[0] not in tensors]
            missing += absent
            if absent:
                continue
            misfits += [
                f"{name} is {list(tensors[name].shape)}, not {list(fits)}"
                for name, fits in zip(names, expected, strict=True)
                if tensors[name].shape != fits
            ]
            dtypes = {tensors[name].dtype for name in names}
            if len(dtypes) > 1:
                misfits.append(
                    f"{', '.join(names)} have different dtypes: {', '.join(map(str, dtypes))}"
                )
            misfits += [
                f"{names[0]} is {dtype}: quantised, and not in MXFP4"
                for dtype in dtypes
                if dtype not in FLOATS
            ]
            make = partial(_made, row, names, tensors, sizes)
            for key in (row.megatron, *row.also):
                pieces.append(
                    Piece(key, index, shape, row.stacked(sizes), next(iter(dtypes)), make)
                )
    extra = [
        name
        for name in tensors
        if name not in wanted and not architecture.unneeded(name, sizes.model)
    ]
    for problem, names in (
        ("are missing", missing),
        ("are not what config.json says", misfits),
        ("are not known", extra),
    ):
        if names:
            more = f"\n… and {len(names) - 5} more" if len(names) > 5 else ""
            raise UserError(
                f"{architecture.name}: {len(names)} tensors {problem}:\n"
                + "\n".join(names[:5])
                + more
            )
    return pieces


def _made(row: TensorRow, names: tuple[str, ...], tensors: Tensors, sizes: Sizes) -> Tensor:
    return row.how.join([tensors.read(name) for name in names], sizes)


def _check_tied(folder: Path, architecture: Architecture, sizes: Sizes, tensors: Tensors) -> None:
    """Refuse tied embeddings with a different output layer: upstream stores only one of both."""
    if LM_HEAD not in tensors:
        return
    embedding = next(row for row in architecture.rows if row.megatron == EMBEDDING)
    (name,) = _found(architecture, embedding, (), tensors)
    rows, head = tensors.read(name), tensors.read(LM_HEAD)
    if head.shape != rows.shape:
        differs = f"is {list(head.shape)}, {name} {list(rows.shape)}"
    elif differing := int((head != rows).any(-1).sum()):
        differs = f"differs from {name} in {differing:,} of {len(rows):,} rows"
    else:
        return
    raise UserError(
        f"{folder}: config.json ties the embeddings (tie_word_embeddings), but {LM_HEAD}"
        f" {differs}\n"
        f'"tie_word_embeddings": false in config.json keeps both; without {LM_HEAD} in the files'
        " the embedding serves as both"
    )


def _found(
    architecture: Architecture, row: TensorRow, index: tuple[int, ...], tensors: Tensors
) -> tuple[str, ...]:
    """The names in ``tensors``; files of a base model have no prefix."""
    names = row.names(index)
    bare = tuple(name.removeprefix(architecture.prefix) for name in names)
    return bare if all(name.partition("[")[0] in tensors for name in bare) else names


def states(sizes: Sizes) -> dict[str, Any]:
    """Empty extra states by upstream's names: key/shard_<layer, expert>_<their numbers>."""
    layers, experts = sizes.model.num_layers, sizes.model.num_experts or 0
    found = {
        f"{LAYERS}{module}._extra_state/shard_{n}_{layers}"
        for module in _STATEFUL
        for n in range(layers)
    }
    found |= {
        f"{LAYERS}{module}._extra_state/shard_{n}.{e}_{layers}.{experts}"
        for module in _STATEFUL_EXPERTS
        for n in range(layers)
        for e in range(experts)
    }
    return dict.fromkeys([*sorted(found), "decoder.final_layernorm._extra_state/shard_0_1"])


def _common(words: list[str], sizes: Sizes) -> dict[str, Any]:
    """Upstream's common state (generate_state_dict in megatron/training/checkpointing.py)."""
    args = arguments.parse(words)
    args.padded_vocab_size, args.vocab_size = sizes.vocabulary, sizes.model.vocab_size
    args.ckpt_format, args.iteration = torch_dist.BACKEND, 0
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False},
    }


def _check_tokenizer(folder: Path, vocab_size: int) -> bool:
    vocabulary = hub.vocabulary_of(folder)
    if vocabulary and (largest := max(vocabulary.values())) >= vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {largest:,}, the model's vocabulary ends at"
            f" {vocab_size - 1:,}: it belongs to another model\nget both from the same repository"
        )
    return vocabulary is not None or (folder / "tokenizer.model").exists()


def _check_room(target: Path, needed: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed * 1.1:
        raise UserError(
            f"{target.parent} has {free / 2**30:.1f} GiB free, the weights need"
            f" {needed / 2**30:.1f} GiB"
        )
