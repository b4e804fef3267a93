"""Norm of queries and keys over all heads together, as in OLMoE.

Upstream's ``--qk-layernorm`` normalises each head.

Source: Muennighoff et al. 2024 (arXiv:2409.02060), section 2 and appendix B.2; ``OlmoeAttention``
in transformers.
"""

from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec


class ProjectionNorm(torch.nn.Module):
    """RMS norm over the heads of all tensor-parallel ranks.

    Every rank holds the weights of all heads and uses its own part. Upstream sums the gradients of
    ``q_layernorm`` and ``k_layernorm`` over these ranks; the parts of other ranks are zero. So a
    checkpoint has the weights once.
    """

    def __init__(
        self, hidden_size: int, config: TransformerConfig, eps: float, *, heads: str
    ) -> None:
        """
        Args:
            hidden_size: width of one head.
            heads: the field of ``config`` that says how many heads there are.
        """
        super().__init__()
        self.group = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp
        self.eps = eps
        width = getattr(config, heads) * hidden_size
        self.weight = torch.nn.Parameter(
            torch.ones(width, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x [s, b, heads of this rank, head]."""
        squares = x.float().square().sum((-2, -1), keepdim=True)
        # forward: sum over ranks; backward: every rank used the sum, so gradients are summed, too
        squares = copy_to_tensor_model_parallel_region(
            reduce_from_tensor_model_parallel_region(squares, group=self.group), group=self.group
        )
        scale = torch.rsqrt(squares / len(self.weight) + self.eps)
        weight = self.weight.chunk(self.group.size())[self.group.rank()].view(x.shape[-2:])
        return (x.float() * scale).to(x.dtype) * weight


def layer_spec(config: GPTModelConfig, vp_stage: int | None = None):
    """Upstream's own spec for ``config``, with ``ProjectionNorm`` for queries and keys.

    Needs ``--qk-layernorm``.
    """
    spec = default_layer_spec(config, vp_stage)
    for layer in getattr(spec, "layer_specs", [spec]):
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = partial(ProjectionNorm, heads="num_attention_heads")
        attention.k_layernorm = partial(ProjectionNorm, heads="num_query_groups")
    return spec
