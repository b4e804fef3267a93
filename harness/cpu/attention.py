"""Context-parallel and latent attention in plain torch, with the interfaces of upstream's.

Upstream splits a sequence into 2n chunks and gives rank r of n the chunks r and 2n-1-r: causal
attention is then the same work for every rank. ``--cp-comm-type`` chooses how the ranks attend to
each other's chunks:

* ``a2a`` (Ulysses): an all-to-all exchanges all heads of a slice of the sequence for 1/n of the
  heads of the whole sequence.
* ``all_gather``: every rank gathers all keys and values.
* ``p2p`` (ring attention) is emulated by the same gathering: the sums are the same, but
  nothing overlaps.
* ``a2a+p2p`` does both: neighbouring ranks exchange heads, whose longer parts of the sequence lie
  as those of fewer ranks would; then rings between them are emulated.

Packed sequences (``--sft``) attend within their segments, as Transformer Engine's THD format does.
Windows and softmax sinks are upstream's own, applied to the parts of sequence and heads that this
rank has. Values may be wider or narrower than keys, as latent attention's are.
"""

from copy import copy

import torch
from megatron.core import parallel_state
from megatron.core.models import backends
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    all_to_all_hp2sp,
    all_to_all_sp2hp,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.training.utils import print_rank_0

from harness.errors import UserError


def install() -> None:
    """Let upstream's local layer specs build context-parallel and latent attention."""
    backends.DotProductAttention = ContextParallelAttention
    MLASelfAttention._qkv_down_projection = _whole_projections_down


def sequence_positions(context_parallel: int, sequence: int) -> torch.Tensor:
    """Positions [sequence] in the order in which ranks 0, 1, … n-1 hold them."""
    chunks = torch.arange(sequence).chunk(2 * context_parallel)
    return torch.cat(
        [torch.cat((chunks[rank], chunks[-1 - rank])) for rank in range(context_parallel)]
    )


def _masked(distance: torch.Tensor, window: tuple[int, int] | None) -> torch.Tensor:
    """Keys hidden from a query, by how many places they lie before it.

    ``window``: as upstream's --window-size.
    """
    later = distance < 0
    return later | (distance > window[0]) if window else later


_split_projections_down = MLASelfAttention._qkv_down_projection


def _whole_projections_down(self: MLASelfAttention, hidden: torch.Tensor) -> tuple:
    """Latent attention's projections down, whole on every rank as Transformer Engine's are.

    Upstream's local layers split their outputs, and after gathering leave out the gradient that the
    rotary keys, which all heads share, get from the heads of other ranks.
    """
    queries, pairs = _split_projections_down(self, hidden)
    width = self.config.kv_lora_rank
    if pairs.size(-1) == width + self.config.qk_pos_emb_head_dim:
        return queries, pairs
    pairs = gather_from_tensor_model_parallel_region(pairs, group=self.tp_group)
    if self.config.sequence_parallel:
        return queries, scatter_to_sequence_parallel_region(pairs, group=self.tp_group)
    compressed, rotary = pairs[..., :width], pairs[..., width:]
    rotary = copy_to_tensor_model_parallel_region(rotary, group=self.tp_group)
    return queries, torch.cat([compressed, rotary], dim=-1)


def _levels(group, cp_comm_type: str | None) -> tuple:
    """The groups that exchange heads, and keys and values; None where there is none."""
    if group.size() == 1:
        return None, None
    if cp_comm_type == "a2a+p2p":
        return parallel_state.get_hierarchical_context_parallel_groups()
    return (group, None) if cp_comm_type == "a2a" else (None, group)


class ContextParallelAttention(DotProductAttention):
    """Attention over a sequence that is split over the context-parallel group."""

    def __init__(
        self,
        config,
        *args,
        cp_comm_type: str | None = None,
        pg_collection=None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs,
    ):
        """``k_channels``, ``v_channels``: widths of a head's keys and values where they differ, in
        latent attention; upstream's class takes neither."""
        pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups(
            required_pgs=["tp", "cp"]
        )
        whole = copy(config)
        whole.context_parallel_size = 1
        super().__init__(
            whole, *args, cp_comm_type=cp_comm_type, pg_collection=pg_collection, **kwargs
        )
        self.config = config
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        self.group = pg_collection.cp
        self.exchanging_heads, self.exchanging_keys = _levels(self.group, cp_comm_type)
        moved = []
        if self.exchanging_heads:
            size, heads = self.exchanging_heads.size(), self.num_query_groups_per_partition
            if heads % size:
                raise UserError(
                    f"{cp_comm_type}: {heads} key/value heads per rank must be divisible by the"
                    f" {size} ranks that exchange them; try p2p, all_gather"
                )
            self.hidden_size_per_partition //= size
            self.scale_mask_softmax.register_forward_pre_hook(self._sinks_of_my_heads)
            moved.append("heads by all-to-all")
        if self.exchanging_keys:
            self.window, self.scale_mask_softmax.window_size = (
                self.scale_mask_softmax.window_size,
                None,
            )
            moved.append("keys and values by all-gather")
        if moved and self.layer_number == 1:
            print_rank_0(f"> CPU: context parallelism {cp_comm_type} moves {' and '.join(moved)}")

    def forward(self, query, key, value, attention_mask, *args, packed_seq_params=None, **kwargs):
        """Attend: query, key, value [s/cp, b, heads, hn] -> [s/cp, b, hidden]."""
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params, *args, **kwargs)
        if not self.exchanging_heads:
            return self._attend(query, key, value, attention_mask, *args, **kwargs)
        size = self.exchanging_heads.size()
        longer = (self._heads_for_sequence(tensor) for tensor in (query, key, value))
        context = self._attend(*longer, None, *args, **kwargs)
        length, batch, hidden = context.shape
        ordered = context[sequence_positions(size, length)].reshape(-1, hidden)
        scattered = all_to_all_hp2sp(ordered, group=self.exchanging_heads)
        return scattered.view(query.shape[0], batch, hidden * size)

    def _attend(self, query, key, value, attention_mask, *args, **kwargs):
        """Attend to the keys and values of all ranks that exchange these."""
        if not self.exchanging_keys:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        size, rank = self.exchanging_keys.size(), self.exchanging_keys.rank()
        positions = sequence_positions(size, query.shape[0] * size)
        gathered = (
            gather_from_sequence_parallel_region(tensor, group=self.exchanging_keys)
            for tensor in (key, value)
        )
        key, value = (tensor[torch.argsort(positions)] for tensor in gathered)
        mine = positions.chunk(size)[rank]
        masked = _masked(mine[:, None] - torch.arange(len(positions)), self.window)
        return super().forward(query, key, value, masked[None, None], *args, **kwargs)

    def _packed(self, query, key, value, packed, *args, **kwargs):
        """Attend within segments: query, key, value [t, heads, hn] -> [t, 1, hidden].

        Samples lie one after another in t. No segment crosses a sample, so they are attended to as
        a batch.
        """
        if self.group.size() > 1:
            raise UserError(
                "CPU: packed sequences under context parallelism need Transformer Engine; set"
                " cp = 1"
            )
        length = packed.tokens_per_sample
        places = torch.arange(length)
        segments = torch.bucketize(
            torch.arange(len(query)), packed.cu_seqlens_q[1:].long(), right=True
        ).view(-1, 1, length)
        softmax = self.scale_mask_softmax
        # upstream's FusedScaleMaskSoftmax would build a window mask in place of this one
        window, softmax.window_size = softmax.window_size, None
        masked = _masked(places[:, None] - places, window) | (
            segments[..., None] != segments[..., None, :]
        )
        batch = (
            x.unflatten(0, (-1, length)).transpose(0, 1).contiguous() for x in (query, key, value)
        )
        try:
            return (
                super()
                .forward(*batch, masked, *args, **kwargs)
                .transpose(0, 1)
                .flatten(0, 1)
                .unsqueeze(1)
            )
        finally:
            softmax.window_size = window

    def _sinks_of_my_heads(self, _, inputs: tuple) -> tuple:
        """The softmax's inputs (scores, mask, sinks of all heads) with the sinks of this rank's
        heads."""
        *others, sinks = inputs
        group = self.exchanging_heads
        return *others, sinks if sinks is None else sinks.chunk(group.size())[group.rank()]

    def _heads_for_sequence(self, tensor: torch.Tensor) -> torch.Tensor:
        """Exchange n ranks' [s, b, heads, hn] for [n s, b, heads/n, hn], in order of positions."""
        length, batch, heads, width = tensor.shape
        size, group = self.exchanging_heads.size(), self.exchanging_heads
        longer = all_to_all_sp2hp(tensor.reshape(length * batch, heads * width), group=group)
        longer = longer.view(length * size, batch, heads // size, width)
        return longer[torch.argsort(sequence_positions(size, length * size))]
