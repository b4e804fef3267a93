"""Builds index mappings (which tokens make sample n) before the ranks of a run start.

Upstream builds them on rank 0 while all other ranks wait, and a second node does not find them
without a shared disk. The files here have the names and bytes that core_v0.19.0's
megatron/core/datasets/gpt_dataset.py and blended_dataset.py would write, so every rank finds them
in ``--data-cache-path``. For a run with other arguments upstream builds its own.

This uses upstream's compiled loops, without importing torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from harness.data import indexed
from harness.data.data_sets import Blend, DataSet
from harness.data.header import FormatError
from harness.data.splits import SPLITS, Bounds, check_split, sequences_of, split_matrix
from harness.errors import UserError
from harness.system.files import atomic, write_text

_SURPLUS = 0.005
"""Upstream's mid_level_dataset_surplus: the share of samples that each set of a blend gets beyond
its weight."""
_FINAL_EPOCH_SHARE = 0.80
"""Upstream shuffles the last epoch separately if less than this share of its samples is needed
(gpt_dataset.py, _build_document_sample_shuffle_indices)."""


@dataclass(frozen=True)
class SampleRequest:
    """The samples that a run needs.

    Attributes:
        seq_length: tokens of a sample.
        samples: numbers for training, validation and test.
        split: as upstream's ``--split``.
    """

    seq_length: int
    samples: tuple[int, int, int]
    split: str
    seed: int = 1234


def build(blend: Blend, use: SampleRequest) -> int:
    """Build the missing mappings of ``use`` in ``blend.cache``; returns the number of new files.

    Processes that do this at the same time wait for each other.

    Raises:
        UserError: a set is damaged or too small for the split, the disk cannot be written, or
            megatron-core is not installed.
    """
    check_split(blend, use.split)
    builder = _Builder(blend, use)
    try:
        blend.cache.mkdir(parents=True, exist_ok=True)
        with (blend.cache / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return sum(builder.build())
    except FormatError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"index mappings in {blend.cache}: {error.strerror}") from None


class _Builder:
    """Writes the missing files of one request; its methods return or yield numbers of files."""

    def __init__(self, blend: Blend, use: SampleRequest) -> None:
        self.blend, self.use = blend, use
        self.matrix, self.helpers = split_matrix(use.split), _helpers()

    def build(self) -> Iterator[int]:
        weights = _normal(map(float, self.blend.weights)) if self.blend.weights else None
        lengths = [indexed.check_pair(chosen.prefix).lengths for chosen in self.blend.sets]
        for split, bounds, samples in zip(SPLITS, self.matrix, self.use.samples, strict=True):
            if bounds is None:
                continue
            wanted = targets = [samples]
            if weights:
                targets = [math.ceil(samples * weight) for weight in weights]
                wanted = [math.ceil(target * (1 + _SURPLUS)) for target in targets]
            sets = []
            for chosen, own, number in zip(self.blend.sets, lengths, wanted, strict=True):
                sets.append(self.describe(chosen.prefix, split, number))
                yield self._write_set(sets[-1], own, bounds)
            if weights:
                yield self._write_blend(sets, split, weights, sum(targets))

    def describe(self, prefix: Path, split: str, samples: int) -> dict[str, Any]:
        """GPTDataset's unique_identifiers, in its order."""
        return {
            "class": "GPTDataset",
            "dataset_path": str(prefix),
            "num_samples": samples,
            "index_split": split,
            "random_seed": self.use.seed,
            "sequence_length": self.use.seq_length,
            "split": self.use.split,
            "split_matrix": self.matrix,
            "tokenizer": _tokenizer(self.blend.sets[0]),
        }

    def _write_set(self, described: dict[str, Any], lengths: np.ndarray, bounds: Bounds) -> int:
        """Write document, sample and shuffle index of one split of one set."""
        names = ("document_index", "sample_index", "shuffle_index")
        make = partial(self._indices, described["num_samples"], lengths, bounds)
        return self._write(described, described["index_split"], names, make)

    def _indices(
        self, samples: int, lengths: np.ndarray, bounds: Bounds
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document, sample and shuffle index. The order of random draws is upstream's."""
        seq_length = self.use.seq_length
        documents = np.arange(*sequences_of(bounds, len(lengths)), dtype=np.int32)
        epoch_tokens = int(lengths[documents].sum(dtype=np.int64))
        epochs = max(1, -(-(samples * seq_length + 1) // epoch_tokens))
        before_last, separate = (epochs - 1) * epoch_tokens, False
        if epochs > 1:
            whole = (before_last - 1) // seq_length
            epoch_samples = (epoch_tokens - 1) // seq_length
            separate = samples - whole < int(_FINAL_EPOCH_SHARE * epoch_samples)
        random = np.random.RandomState(self.use.seed)
        order = _shuffled_epochs(documents, epochs, separate, random)
        wide = max(len(order), int(lengths.max())) > np.iinfo(np.int32).max
        build = self.helpers.build_sample_idx_int64 if wide else self.helpers.build_sample_idx_int32
        sample_index = build(
            lengths.astype(np.int32), order, seq_length, epochs, epoch_tokens, True, 1
        )
        rows = len(sample_index) - 1
        first = whole if separate else rows
        kind = np.int64 if rows >= np.iinfo(np.uint32).max - 1 else np.uint32
        shuffles = [np.arange(first, dtype=kind), np.arange(first, rows, dtype=kind)]
        for part in shuffles:
            random.shuffle(part)
        return order, sample_index, np.concatenate(shuffles)

    def _write_blend(
        self, sets: list[dict[str, Any]], split: str, weights: list[float], size: int
    ) -> int:
        """Write which set, and which of its samples, each sample of a blend is."""
        described = {
            "class": "BlendedDataset",
            "datasets": sets,
            "split": split,
            "weights": _normal(weights),
            "size": size,
        }

        def make() -> tuple[np.ndarray, np.ndarray]:
            found = np.zeros(size, np.int16), np.zeros(size, np.int64)
            weights = described["weights"]
            self.helpers.build_blending_indices(*found, weights, len(sets), size, False)
            return found

        return self._write(described, split, ("dataset_index", "dataset_sample_index"), make)

    def _write(
        self,
        described: dict[str, Any],
        split: str,
        names: Sequence[str],
        make: Callable[[], tuple[np.ndarray, ...]],
    ) -> int:
        """Write the arrays that ``make`` returns, then the description, unless all exist."""
        text = json.dumps(described, indent=4)
        digest = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        stem = f"{digest}-{described['class']}-{split}"
        description = self.blend.cache / f"{stem}-description.txt"
        paths = [self.blend.cache / f"{stem}-{name}.npy" for name in names]
        if all(path.is_file() for path in (*paths, description)):
            return 0
        for path, array in zip(paths, make(), strict=True):
            with atomic(path) as file:
                np.save(file, array, allow_pickle=True)
        write_text(description, text)
        return len(paths) + 1


def _shuffled_epochs(
    documents: np.ndarray, epochs: int, separate: bool, random: np.random.RandomState
) -> np.ndarray:
    """``documents`` repeated for each epoch and shuffled, the last epoch separately if asked."""
    parts = [np.tile(documents, epochs - separate)]
    if separate:
        parts.append(documents.copy())
    for part in parts:
        random.shuffle(part)
    return np.concatenate(parts)


def _tokenizer(chosen: DataSet) -> dict[str, Any]:
    """MegatronTokenizerText's unique_identifiers, with upstream's defaults of all other
    arguments."""
    common = {
        "class": "megatron.core.tokenizers.text.models.default_tokenizer.DefaultTokenizerText"
    }
    common["tokenizer_path"] = (
        None if chosen.tokenizer_model is None else str(chosen.tokenizer_model)
    )
    match chosen.tokenizer_type:
        case "NullTokenizer":
            return common | {"vocab_size": str(chosen.vocab_size), "pad_id": "-1"}
        case "SentencePieceTokenizer":
            names = ("chat_template", "ignore_extra_whitespaces", "legacy", "special_tokens")
            return common | dict(zip(names, ("None", "True", "False", "None"), strict=True))
        case _:
            files = dict.fromkeys(("chat_template", "vocab_file", "merges_file"), "None")
            flags = {
                "use_fast": "True",
                "trust_remote_code": "False",
                "include_special_tokens": "True",
            }
            return common | files | {"additional_special_tokens": "[]"} | flags


def _normal(weights: Any) -> list[float]:
    values = np.array(list(weights), np.float64)
    return (values / values.sum()).tolist()


def _helpers() -> ModuleType:
    """megatron-core's compiled loops, without importing megatron-core and with it torch."""
    found = importlib.util.find_spec("megatron")
    for root in found.submodule_search_locations if found else ():
        for path in Path(root, "core", "datasets").glob("helpers_cpp.*.so"):
            spec = importlib.util.spec_from_file_location("helpers_cpp", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise UserError("megatron-core is not installed: scripts/setup.sh heavy")
