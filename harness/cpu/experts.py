"""Experts with biases in upstream's ``SequentialMLP``, which GPUs do not use."""

from megatron.core.tensor_parallel import layers


def install() -> None:
    """Let experts with biases train, on one rank and under sequence parallelism."""
    reduce, build = (
        layers.reduce_from_tensor_model_parallel_region,
        layers.RowParallelLinear.__init__,
    )

    # On one rank, upstream's function returns its input as a view of a custom autograd function.
    # Autograd forbids changing such a view in place, and upstream adds the bias in place.
    layers.reduce_from_tensor_model_parallel_region = lambda tensor, group: (
        tensor if group.size() == 1 else reduce(tensor, group=group)
    )

    # Tensor-parallel ranks hold different experts. Upstream sums gradients of parameters marked
    # sequence_parallel over these ranks, which would mix their biases.
    def build_apart(self, *args, **kwargs) -> None:
        build(self, *args, **kwargs)
        if self.is_expert and self.bias is not None:
            self.bias.sequence_parallel = False

    layers.RowParallelLinear.__init__ = build_apart
