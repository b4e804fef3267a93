"""Experts with biases in upstream's ``SequentialMLP``, which on a GPU Transformer Engine's grouped
layers stand for."""

from megatron.core.tensor_parallel import layers


def install() -> None:
    """Let experts with biases train, on one rank and beside sequence parallelism."""
    reduce, build = (
        layers.reduce_from_tensor_model_parallel_region,
        layers.RowParallelLinear.__init__,
    )

    # Over one rank, it hands its input on as a view that autograd protects, and upstream adds the
    # bias to it in place.
    layers.reduce_from_tensor_model_parallel_region = lambda tensor, group: (
        tensor if group.size() == 1 else reduce(tensor, group=group)
    )

    # Tensor-parallel ranks hold different experts: sequence parallelism must not sum the gradients
    # of their biases.
    def build_apart(self, *args, **kwargs) -> None:
        build(self, *args, **kwargs)
        if self.is_expert and self.bias is not None:
            self.bias.sequence_parallel = False

    layers.RowParallelLinear.__init__ = build_apart
