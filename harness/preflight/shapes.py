"""What is measured: the shapes that the catalogue's experiments have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from harness.experiment.catalog import load_catalog
from harness.predict.flops import padded_vocab_size
from harness.predict.work import linear_shapes

MOST_PRODUCTS = 30
SMALL_PRODUCTS = ((256, 256, 256), (512, 256, 256))
FP8_PRODUCTS = ((8192, 6144, 4096), (8192, 28672, 4096), (8192, 4096, 14336), (15360, 6400, 1600))
"""Llama 3 8B's at one sequence, and the first of the MLP of GPT-2 XL (111)."""
GROUPED = (
    (64, 2048, 2048, 2048),
    (32, 1024, 2048, 1024),
    (16, 2048, 5760, 2880),
    (8, 4096, 28672, 4096),
)
"""Experts, rows of each, columns, inner size: OLMoE, its half-width stand-in, GPT-OSS, Mixtral."""
ATTENTION_TOKENS = 2**16
"""So many that short sequences, too, take longer on the GPU than to launch."""
ATTENTION = tuple(
    (*heads, length, ATTENTION_TOKENS // length, dropout)
    for heads in ((64, 16, 16), (128, 16, 16))
    for length in (1024, 4096, 8192)
    for dropout in (0.1, 0.0)
)
"""Head size, heads, heads of keys; sequence length, sequences, dropout."""
SMALL_ATTENTION = ((16, 4, 4, 128, 1, 0.1), (16, 4, 4, 128, 1, 0.0))


def products() -> list[tuple[int, int, int]]:
    """(tokens, output size, input size) of the catalogue's linear layers, the commonest first.

    Of dense layers and output layers on one rank; those of experts are ``GROUPED``.
    """
    found: Counter[tuple[int, int, int]] = Counter()
    for experiment in load_catalog().experiments:
        vocabulary = padded_vocab_size(experiment.model.vocab_size, experiment.tp) / experiment.tp
        output = (experiment.rank_tokens, vocabulary, experiment.model.hidden_size)
        for rows, columns, inner in (*linear_shapes(experiment), output):
            found[int(rows), int(columns), int(inner)] += 1
    return [shape for shape, _ in found.most_common()]


def chosen_products(device: str, quick: bool) -> Sequence[tuple[int, int, int]]:
    """The products to measure on this device."""
    if device == "cpu":
        return SMALL_PRODUCTS
    return products()[: MOST_PRODUCTS // 5 if quick else MOST_PRODUCTS]
