"""Splits of a data set: which sequences are for training, validation and test. Needs no numpy."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

from harness.data.data_sets import Blend
from harness.errors import UserError

SPLITS = ("train", "valid", "test")

Bounds = tuple[float, float]


def split_matrix(split: str) -> tuple[Bounds | None, ...]:
    """Begin and end of each of SPLITS as fractions of a set's sequences; None for a share of 0.

    Args:
        split: as upstream's ``--split``, such as ``949,50,1``.

    Raises:
        UserError: it is not up to three numbers, at least one of them above 0.
    """
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    total = sum(shares)
    right = 0 < len(shares) <= len(SPLITS) and min(shares) >= 0 and 0 < total < math.inf
    if not right:
        raise UserError(f"SPLIT={split}: give the shares of {', '.join(SPLITS)}, such as 949,50,1")
    ends = accumulate(
        [*(share / total for share in shares), *[0.0] * (len(SPLITS) - len(shares))], initial=0
    )
    return tuple((begin, end) if end > begin else None for begin, end in pairwise(ends))


def sequences_of(bounds: Bounds, sequences: int) -> tuple[int, int]:
    """The first sequence of a split and the first after it, rounded as upstream does."""
    first, behind = (round(bound * float(sequences)) for bound in bounds)
    return first, behind


def samples_of(
    steps: int, global_batch_size: int, eval_interval: int, eval_iters: int
) -> tuple[int, int, int]:
    """Samples for training, validation and test (upstream: get_train_valid_test_num_samples)."""
    evaluations = steps // eval_interval + 1
    return (
        steps * global_batch_size,
        evaluations * eval_iters * global_batch_size,
        eval_iters * global_batch_size,
    )


def check_split(blend: Blend, split: str) -> None:
    """Refuse a split that leaves a share without sequences: upstream would loop for ever.

    Raises:
        UserError: a share above 0 of one of the sets is empty.
    """
    for chosen in blend.sets:
        parts, what = (
            (chosen.documents, "conversations") if chosen.chat else (chosen.sequences, "sequences")
        )
        for name, bounds in zip(SPLITS, split_matrix(split), strict=True):
            if bounds is None:
                continue
            first, behind = sequences_of(bounds, parts)
            if first == behind:
                raise UserError(
                    f"DATA={chosen.name}: of its {parts:,} {what} the split {split} leaves none for"
                    f" {name}\ngive {name} a larger share, or 0, with SPLIT="
                )
