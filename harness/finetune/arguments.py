"""LoRA's command-line arguments, which checkpoints store with upstream's own."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator

from harness.experiment.model import Lora


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add ``--lora-…`` to upstream's parser."""
    group = parser.add_argument_group(title="lora")
    group.add_argument(
        "--lora-rank",
        type=int,
        default=None,
        help="Rank of the adapters; no adapters without it.",
    )
    group.add_argument(
        "--lora-alpha",
        type=float,
        default=None,
        help="The output of adapters is scaled by alpha / rank.",
    )
    group.add_argument(
        "--lora-dropout", type=float, default=0.0, help="Dropout of the adapters' input."
    )
    group.add_argument(
        "--lora-targets", nargs="+", default=None, help="The linear layers that get an adapter."
    )
    return parser


def flags(lora: Lora) -> Iterator[str]:
    """The arguments for ``lora``."""
    yield f"--lora-rank {lora.rank} --lora-alpha {lora.alpha} --lora-dropout {lora.dropout}"
    yield f"--lora-targets {' '.join(lora.targets)}"


def lora_of(args: Namespace) -> Lora | None:
    """The LoRA settings in ``args``; None without LoRA."""
    if getattr(args, "lora_rank", None) is None:
        return None
    return Lora(
        rank=args.lora_rank,
        alpha=args.lora_alpha,
        dropout=args.lora_dropout,
        targets=tuple(args.lora_targets),
    )
