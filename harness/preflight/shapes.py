"""What is measured: the shapes that the catalogue's experiments have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from harness.experiment.catalog import load_catalog
from harness.experiment.experiment import Experiment

MOST_PRODUCTS = 40
SMALL_PRODUCTS = ((256, 256, 256), (512, 256, 256))
FP8_PRODUCTS = ((8192, 6144, 4096), (8192, 28672, 4096), (8192, 4096, 14336), (15360, 6400, 1600))
"""Llama 3 8B's at one sequence, and the first of the MLP of GPT-2 XL (111)."""
GROUPED = (
    (64, 512, 2048, 2048),
    (64, 2048, 2048, 2048),
    (64, 512, 2048, 1024),
    (32, 1024, 2048, 1024),
    (16, 2048, 5760, 2880),
    (8, 4096, 28672, 4096),
)
"""Experts, rows of each, columns, inner size: OLMoE, its half-width stand-in, GPT-OSS, Mixtral."""
ATTENTION_TOKENS = 2**16
"""So many that short sequences, too, take longer on the GPU than to launch."""
ATTENTION = tuple(
    (
        head_size,
        heads,
        heads // 4 if grouped else heads,
        length,
        ATTENTION_TOKENS // length,
        dropout,
    )
    for head_size, heads, grouped in ((64, 16, False), (128, 16, False), (128, 32, True))
    for length in (1024, 4096, 8192)
    for dropout in (0.1, 0.0)
)
SMALL_ATTENTION = ((16, 4, 4, 128, 1, 0.1), (16, 4, 4, 128, 1, 0.0))


def products(experiments: Iterable[Experiment] | None = None) -> list[tuple[int, int, int]]:
    """(tokens, output size, input size) of the catalogue's linear layers, the commonest first.

    Of dense layers and output layers on one rank; those of experts are ``GROUPED``.
    """
    from harness.predict.flops import padded_vocab_size

    found: Counter[tuple[int, int, int]] = Counter()
    for experiment in experiments or load_catalog().experiments:
        model, tp = experiment.model, experiment.tp
        tokens = experiment.micro_batch_size * experiment.seq_length // experiment.cp
        found[tokens, model.qkv_size // tp, model.hidden_size] += 1
        found[tokens, model.hidden_size, model.query_size // tp] += 1
        if not model.num_experts:
            found[tokens, model.ffn // tp * model.fc1_matrices, model.hidden_size] += 1
            found[tokens, model.hidden_size, model.ffn // tp] += 1
        vocabulary = padded_vocab_size(model.vocab_size, tp) // tp
        found[tokens, vocabulary, model.hidden_size] += 1
    return [shape for shape, _ in found.most_common()]


def chosen_products(device: str, quick: bool) -> Sequence[tuple[int, int, int]]:
    """The products to measure on this device."""
    if device == "cpu":
        return SMALL_PRODUCTS
    return products()[: MOST_PRODUCTS // 5 if quick else MOST_PRODUCTS]
