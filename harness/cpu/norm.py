"""Layer norms in plain torch under sequence parallelism."""

from copy import copy

from megatron.core.transformer.torch_norm import WrappedTorchNorm


def install() -> None:
    """Let upstream's ``WrappedTorchNorm`` work under sequence parallelism, which it refuses.

    Every tensor-parallel rank normalises its own slice of the sequence, so the gradients of the
    norm's parameters must be summed over these ranks. Upstream does that for parameters marked
    ``sequence_parallel`` (megatron/core/distributed/finalize_model_grads.py).
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
