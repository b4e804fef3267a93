"""Packed conversations for upstream's ``--sft`` path, in place of upstream's ``SFTDataset``.

From the batch on, the path is upstream's: ``--sft`` broadcasts ``cu_seqlens`` to all stages, gives
them to attention in Transformer Engine's THD format, so that no conversation attends to another,
and counts FLOPs by them (pretrain_gpt.py). Its data set (megatron/training/datasets/sft_dataset.py)
is not used: it tokenises while training, packs only conversations that one line of the input
already joins, truncates silently, and recognises answers in two formats of Nemotron's only. Here
tokens and answers are those of ``make data-chat``.

A document of the ``.bin``/``.idx`` pair is a conversation, whose sequences alternate between
prompts and answers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.training.utils import print_rank_0

from harness.errors import UserError
from harness.finetune.packing import pack


class ChatDataset(MegatronDataset):
    """Sequences of several conversations, each a segment; only answers count in the loss.

    A conversation of n tokens takes n - 1 positions: its last token is only a label, so that no
    token is predicted from another conversation. One that is longer than a sequence is truncated at
    its end, and skipped if no answer remains. Each epoch has the same sequences in another order.
    """

    def __init__(self, dataset, dataset_path, indices, num_samples, index_split, config) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        lengths = np.asarray(dataset.sequence_lengths)
        self._starts = np.asarray(dataset.document_indices)
        ends = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        tokens = np.diff(ends[self._starts])[indices]
        prompts = lengths[self._starts[indices]]
        room = config.sequence_length
        # With a prompt of ``room`` tokens, the first token of the answer still is a label.
        fits = (tokens > 1) & (prompts <= room)
        self._conversations = np.asarray(indices)[fits]
        places = np.minimum(tokens[fits] - 1, room)
        if not len(places):
            raise UserError(
                f"{dataset_path}: none of {len(tokens):,} conversations has an answer within {room}"
                " tokens\ngive longer sequences: SEQ="
            )
        self._packs = pack(places.tolist(), room)
        self._order = (-1, np.empty(0, np.int64))
        filled = places.sum() / (len(self._packs) * room)
        print_rank_0(
            f"> {index_split.name}: {len(places):,} conversations in {len(self._packs):,} sequences"
            f" of {room}, {filled:.0%} filled; cut at the end: {(tokens[fits] - 1 > room).sum():,};"
            f" skipped, no answer within a sequence: {len(tokens) - len(places):,}"
        )

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """The number of conversations, to split into training, validation and test."""
        return len(low_level_dataset.document_indices) - 1

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config) -> IndexedDataset:
        """Open the ``.bin``/``.idx`` pair."""
        return IndexedDataset(dataset_path, multimodal=False, mmap=config.mmap_bin_files)

    def __len__(self) -> int:
        return len(self._packs) if self.num_samples is None else self.num_samples

    def __getitem__(self, sample: int) -> dict[str, Any]:
        """One sequence of s tokens.

        Returns:
            ``tokens``, ``labels``, ``position_ids`` and ``loss_mask`` [s]; ``cu_seqlens`` [s + 1],
            the bounds of its segments, filled up with s; ``max_seqlen``, the longest segment.
        """
        room = self.config.sequence_length
        epoch, at = divmod(int(sample), len(self._packs))
        tokens, labels, positions = (np.zeros(room, np.int64) for _ in range(3))
        mask = np.zeros(room, np.float32)
        bounds = [0]
        for item in self._packs[self._ordered(epoch)[at]]:
            ids, answers = self._conversation(self._conversations[item], room + 1)
            begin, end = bounds[-1], bounds[-1] + len(ids) - 1
            tokens[begin:end], labels[begin:end], mask[begin:end] = ids[:-1], ids[1:], answers[1:]
            positions[begin:end] = np.arange(end - begin)
            bounds.append(end)
        if bounds[-1] < room:  # padding is a segment without loss
            positions[bounds[-1] :] = np.arange(room - bounds[-1])
            bounds.append(room)
        segments = np.full(room + 1, room, np.int32)
        segments[: len(bounds)] = bounds
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(mask),
            "position_ids": torch.from_numpy(positions),
            "cu_seqlens": torch.from_numpy(segments),
            "max_seqlen": torch.tensor(max(np.diff(bounds)), dtype=torch.int32),
        }

    def _conversation(self, number: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The first ``most`` tokens of a conversation, and which of them belong to answers."""
        first, behind = self._starts[number], self._starts[number + 1]
        parts = [self.dataset[int(n)] for n in range(first, behind)]
        answers = np.repeat(np.arange(len(parts)) % 2 == 1, [len(part) for part in parts])
        return np.concatenate(parts)[:most].astype(np.int64), answers[:most]

    def _ordered(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            generator = np.random.default_rng([self.config.random_seed, epoch])
            self._order = epoch, generator.permutation(len(self._packs))
        return self._order[1]
