"""Checkpoints of HybridModel: a GPT's, as harness/specs/hybrid.py saves its layers.

So GPTModel and HybridModel load each other's, upstream's as well as those here: pretrain_gpt.py
reads them as its own, pretrain_hybrid.py as a GPT's (``_maybe_setup_gpt_to_hybrid_load`` in
megatron/training/checkpointing.py). A model with Mamba layers is no GPT: upstream saves it as
it is.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

PATTERN = "--hybrid-layer-pattern"


def is_asked_for() -> bool:
    """Whether this run's arguments describe a HybridModel."""
    return PATTERN in sys.argv


def install() -> None:
    """In a run of a GPT as HybridModel, save and compare arguments as those of the GPT."""
    if not is_asked_for() or "M" in sys.argv[sys.argv.index(PATTERN) + 1]:
        return
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.training import checkpointing, get_args

    state_of = HybridModel.sharded_state_dict
    make_state, check = checkpointing.generate_state_dict, checkpointing.check_checkpoint_args

    def generate_state_dict(args: Namespace, *more: Any, **named: Any) -> dict:
        return make_state(as_gpt(args), *more, **named)

    def check_checkpoint_args(saved: Namespace, *more: Any, **named: Any) -> None:
        args = get_args()
        counted, args.num_layers = args.num_layers, as_gpt(args).num_layers
        try:
            check(saved, *more, **named)
        finally:
            args.num_layers = counted

    def sharded_state_dict(self: HybridModel, prefix: str = "", *more: Any, **named: Any) -> dict:
        state = state_of(self, prefix, *more, **named)
        state.pop(f"{prefix}output_layer._extra_state", None)  # empty, and GPTModel has none
        return state

    HybridModel.sharded_state_dict = sharded_state_dict
    checkpointing.generate_state_dict = generate_state_dict
    checkpointing.check_checkpoint_args = check_checkpoint_args
    # upstream would look for its own names of layers
    checkpointing._maybe_setup_gpt_to_hybrid_load = lambda *_: (None, False)


def as_gpt(args: Namespace) -> Namespace:
    """Upstream's arguments of the same GPT: HybridModel counts attention and MLP apart."""
    gpt = {"num_layers": args.num_layers // 2, "hybrid_layer_pattern": None, "spec": None}
    return Namespace(**vars(args) | gpt)
