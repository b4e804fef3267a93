"""Layer norms in plain torch that know sequence parallelism."""

from copy import copy

from megatron.core.transformer.torch_norm import WrappedTorchNorm


def install() -> None:
    """Let upstream's torch norm serve under sequence parallelism, as Transformer Engine's does.

    Every tensor-parallel rank then normalises its own slice of the sequence, so the gradients of
    the norm's parameters have to be summed over these ranks: upstream does that for parameters
    marked ``sequence_parallel``.
    """
    build = WrappedTorchNorm.__new__

    def build_marked(cls, config, *args, **kwargs):
        unaware = copy(config)
        unaware.sequence_parallel = False
        norm = build(cls, unaware, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = build_marked
