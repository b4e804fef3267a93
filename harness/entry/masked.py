"""Secrets of ARGS= in a rank: its arguments have them; its output, logs and checkpoints do not.

Upstream prints every argument, writes them to TensorBoard and Weights & Biases, and stores them in
checkpoints.
"""

import copy
import sys
from argparse import Namespace
from functools import wraps
from typing import Any

from harness.system.masking import mask, reveal
from harness.system.streams import Wrapped


class Masked(Wrapped):
    """A stream that writes the names of secrets in place of their values."""

    def write(self, text: str) -> int:
        """Write ``text``; returns how long it was."""
        self.stream.write(mask(text))
        return len(text)


def install() -> None:
    """Put secrets into ``sys.argv``, and keep them out of everything upstream writes.

    Raises:
        UserError: see ``masking.reveal``.
    """
    sys.stdout, sys.stderr = Masked(sys.stdout), Masked(sys.stderr)
    hidden, sys.argv[1:] = sys.argv[1:], reveal(sys.argv[1:])
    if sys.argv[1:] != hidden:
        _keep_arguments_masked()


def _keep_arguments_masked() -> None:
    from megatron.training import checkpointing, global_vars

    make_state, set_wandb = checkpointing.generate_state_dict, global_vars._set_wandb_writer

    @wraps(make_state)
    def generate_state_dict(args: Namespace, *more: Any, **named: Any) -> dict:
        return make_state(masked(args), *more, **named)

    @wraps(set_wandb)
    def set_wandb_writer(args: Namespace) -> None:
        set_wandb(masked(args))

    checkpointing.generate_state_dict, global_vars._set_wandb_writer = (
        generate_state_dict,
        set_wandb_writer,
    )
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:  # without the package upstream writes none
        return
    add_text = SummaryWriter.add_text
    SummaryWriter.add_text = lambda self, tag, text, *more, **named: add_text(
        self, tag, mask(text), *more, **named
    )


def masked(args: Namespace) -> Namespace:
    """A copy of ``args`` with the names of secrets in place of their values."""
    found = copy.copy(args)
    for name, value in vars(args).items():
        if isinstance(value, str):
            setattr(found, name, mask(value))
        elif isinstance(value, list | tuple):
            setattr(
                found,
                name,
                type(value)(mask(each) if isinstance(each, str) else each for each in value),
            )
    return found
