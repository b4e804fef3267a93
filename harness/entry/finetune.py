"""Fine-tuning inside a rank: packed conversations, LoRA's arguments, and training of adapters."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from harness.entry.report import RankReport


def install(report: RankReport | None) -> None:
    """Prepare upstream for ``--sft`` and ``--lora-…``; without these arguments nothing changes."""
    from megatron.training import argument_utils, arguments, training
    from megatron.training.datasets import sft_dataset

    from harness.finetune.arguments import add_arguments, lora_of
    from harness.finetune.dataset import ChatDataset

    sft_dataset.SFTDataset = ChatDataset
    add_upstream = arguments.add_megatron_arguments
    arguments.add_megatron_arguments = lambda parser: add_arguments(add_upstream(parser))
    make_config = argument_utils.gpt_config_from_args

    @wraps(make_config)
    def config_with_adapters(args, *rest, **kwargs):
        config = make_config(args, *rest, **kwargs)
        if lora := lora_of(args):
            config.pre_wrap_hooks.append(
                lambda chunks: _with_adapters(chunks, lora, args, training, report)
            )
        return config

    argument_utils.gpt_config_from_args = config_with_adapters


def _with_adapters(chunks: list, lora, args, training, report: RankReport | None) -> list:
    """Freeze upstream's model and add adapters, before upstream wraps it for data parallelism."""
    from megatron.training.utils import print_rank_0

    from harness.finetune import adapters
    from harness.finetune.lora import attach

    attached = attach(chunks, lora, args.seed)
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    print_rank_0(
        f"> LoRA: rank {lora.rank}, alpha {lora.alpha:g}, {', '.join(lora.targets)}: trains"
        f" {trained:,} of {sum(p.numel() for p in parameters):,} parameters on this rank"
    )
    if args.pretrained_checkpoint:
        _load_both(training, adapters.Holding(chunks), args)
    if report:

        def write() -> None:
            adapters.write(
                attached,
                report.run_dir.path / adapters.FOLDER,
                args.pretrained_checkpoint,
                report.step,
            )

        report.at_end.append(write)
        _after_each_save(training, write)
    return chunks


def _load_both(training, holding, args) -> None:
    """Load weights from ``--pretrained-checkpoint``, then adapters from ``--load``, if any.

    Upstream's ``load_checkpoint`` loads one or the other.
    """
    from megatron.training.checkpointing import checkpoint_exists

    load = training.load_checkpoint

    @wraps(load)
    def load_both(*arguments, **kwargs):
        given = {name: getattr(args, name) for name in ("load", "ckpt_step", "finetune")}
        args.load = args.ckpt_step = None
        with holding.the_base():
            begun = load(*arguments, **kwargs)
        vars(args).update(given)
        return load(*arguments, **kwargs) if checkpoint_exists(args.load) else begun

    training.load_checkpoint = load_both


def _after_each_save(training, write: Callable[[], None]) -> None:
    save = training.save_checkpoint

    @wraps(save)
    def save_and_write(*arguments, **kwargs):
        result = save(*arguments, **kwargs)
        write()
        return result

    training.save_checkpoint = save_and_write
