"""The work of a rank's GPU and CPU for one micro-batch, there and back through a pipeline stage,
counted from sizes.

Sources: waves of tiles, NVIDIA's Matrix Multiplication Background User's Guide, section "Dimension
Quantization Effects"; bytes of an all-reduce, 2 (n-1)/n of the message over links, NVIDIA's
nccl-tests, doc/PERFORMANCE.md (where the switch adds up, (n+1)/n: a rank sends its message once,
and for all others its n-th of the sum); what is sent when, megatron/core/tensor_parallel/layers.py
and megatron/core/transformer/moe/token_dispatcher.py, core_v0.19.0.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from harness.experiment.model import COLUMN_PARALLEL
from harness.predict import timeline
from harness.predict.flops import adapter_widths, padded_vocab_size

if TYPE_CHECKING:
    from harness.experiment.experiment import Experiment
    from harness.experiment.hardware import Card

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

MULTIPROCESSORS = 132
"""Of a Hopper GPU with SXM; no other kind was calibrated."""
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9), (64, 256, 0.9), (256, 64, 0.9))
"""Rows and columns that a multiprocessor computes at once, and how fast against the largest."""
KERNEL_S = 3e-6
"""From a kernel's launch to its first result, about."""
MESSAGE_S = 20e-6
"""A collective with nothing to send, about."""
GRAPH_S = 100e-6
"""The CPU's time to launch a graph, through Python and autograd, about."""
OPERATION_S = 10e-6
"""Its time for an operation of PyTorch that no measured row has, about."""
FP8_BYTES = {"delayed": 4, "tensorwise": 6, "blockwise": 4}
"""Per element that becomes fp8: read in bf16, written by rows and by columns; where it is scaled by
its own largest value, read once more to find that (Float8CurrentScalingQuantizer in
transformer_engine/pytorch/tensor)."""
FP8_OPERATIONS = {"delayed": 1, "tensorwise": 3, "blockwise": 1}
GATE_FORWARD_BYTES, GATE_BACKWARD_BYTES = 34, 52
"""Per unit of the attention's output: its gate in fp32, step by step (_apply_output_gate in
transformer/attention.py)."""
PROJECTION_NORM_FORWARD_BYTES, PROJECTION_NORM_BACKWARD_BYTES = 38, 74
PROJECTION_NORM_OPERATIONS = 10
"""The same of queries and keys normalised over all heads (harness/specs/projection_norm.py);
backward twice as many."""
LOSS_BYTES = {False: (38, 14), True: (22, 10)}
"""Per logit, forward and backward, by whether the loss is fused: the softmax in fp32, in steps
(megatron/core/tensor_parallel/cross_entropy.py, megatron/core/fusions/fused_cross_entropy.py)."""


class Calibration(BaseModel):
    """How fast a machine is: the constants that its measured steps determine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    matrix_share: Positive = 0.7
    """Of the peak, what matrix products reach in whole waves of tiles."""
    bandwidth_share: Positive = 0.7
    """Of the memory bandwidth, what everything else reaches."""
    score_forward_ps: Positive = 1.0
    """Attention, besides its products: exponential and dropout of one score, in picoseconds."""
    score_backward_ps: Positive = 2.0
    no_dropout_share: Positive = 0.5
    """Of these, what is left without dropout."""
    link_gb_s: Positive = 330
    """What a rank sends in a second to the others of its node, while they send to it."""
    tensor_exposed: Positive = 0.7
    """Of what tensor parallelism sends in the backward pass, how much is not hidden behind the
    weights' gradients."""
    gradients_exposed: Positive = 0.3
    """Of what the distributed optimizer sends, how much is not hidden behind the passes."""
    fp8_share: Positive = 0.85
    """Of what fp8's higher peak promises over bf16, what matrix products reach."""
    experts_share: Positive = 0.6
    """Of the matrix products' speed, what products of grouped experts reach."""
    routed_passes: Positive = 1.0
    """Bytes that permuting and weighting routed tokens reads and writes, against the count by hand.
    """
    forward_launch_ms: Positive = 0.9
    """The CPU's time for a layer's forward pass."""
    backward_launch_ms: Positive = 1.3
    collective_launch_ms: Positive = 0.1
    context_launch_ms: Positive = 1.0
    """Context parallelism, beside its exchanges, a layer and pass."""
    ring_launch_ms: Positive = 0.2
    """One turn of the ring."""
    router_launch_ms: Positive = 1.0
    expert_launch_ms: Positive = 0.02
    """One expert of a rank, a layer's forward pass; twice as much backward."""
    stage_launch_ms: Positive = 5.0
    """Plain pipelines: a pass's message, and the wait for it (batch_p2p_sync in
    p2p_communication.py)."""
    chunk_launch_ms: Positive = 3.0
    """Interleaved pipelines, a virtual stage's pass: its message overlaps."""
    step_launch_ms: Positive = 15.0
    """Once a step, before its first forward pass; hidden where the GPU has work."""
    step_ms: Positive = 5.0
    """Once a step, never hidden: the optimizer's launches, the norm's way to the CPU."""
    overlap: Positive = 2.5
    """How sharply the slower of GPU and CPU decides: 1 + the exponent of their norm."""


class Work(NamedTuple):
    """Seconds of a rank's GPU for something, and of its CPU to launch it."""

    products: float = 0.0
    attention: float = 0.0
    passes: float = 0.0
    exchange: float = 0.0
    launches: float = 0.0

    @property
    def gpu(self) -> float:
        return self.products + self.attention + self.passes + self.exchange

    def __add__(self, other: Work) -> Work:
        return Work(*map(operator.add, self, other))

    def __mul__(self, times: float) -> Work:
        return Work(*(part * times for part in self))


class Rank:
    """The work of one of ``e``'s ranks for a micro-batch on one machine, part by part; seconds
    throughout."""

    def __init__(
        self, e: Experiment, gpu: Card, calibration: Calibration, switch_reduces: bool
    ) -> None:
        self.e, self.c, self.switch_reduces = e, calibration, switch_reduces
        self.rate = gpu.bf16_tflops * 1e12 * calibration.matrix_share
        self.fp8_rate = (
            (gpu.fp8_tflops or 0) * 1e12 * calibration.matrix_share * calibration.fp8_share
        )
        self.bandwidth = gpu.memory_gb_per_s * 1e9 * calibration.bandwidth_share
        self.link = calibration.link_gb_s * 1e9
        self.tokens = e.micro_batch_size * e.seq_length / e.cp
        self.spread = e.tp if e.sequence_parallel else 1
        self.vocab = padded_vocab_size(e.model.vocab_size, e.tp) / e.tp
        self.gradient_bytes = 2 if e.gradients == "bf16" or e.fully_sharded else 4
        # in bf16 written, read, and added to the sum (no Apex)
        self.weight_gradient_bytes = 0 if e.lora else 4 + 2 * self.gradient_bytes

    def stage_times(self, unit: float = 1.0) -> timeline.Times:
        """Each stage's passes of a micro-batch, in ``1 / unit`` seconds."""
        sides = zip(*self.stages, strict=True)
        return timeline.Times(
            *(tuple(unit * self.together(each) for each in side) for side in sides)
        )

    def together(self, work: Work) -> float:
        """GPU and CPU run side by side: the slower one's time, a little more where they are
        alike."""
        slow, fast = max(work.gpu, work.launches), min(work.gpu, work.launches)
        power = 1 + self.c.overlap
        return slow * (1 + (fast / slow) ** power) ** (1 / power)

    @cached_property
    def stages(self) -> list[tuple[Work, Work]]:
        """The passes of one micro-batch through all layers of each pipeline stage, forward and
        backward."""
        pp = self.e.pp
        forward, backward = (work * (self.e.model.num_layers / pp) for work in self.layer())
        return [
            _added(
                forward,
                backward,
                [self.embedding] * (stage == 0)
                + [self.output] * (stage == pp - 1)
                + [self.messages] * (pp > 1),
            )
            for stage in range(pp)
        ]

    def embedding(self) -> tuple[Work, Work]:
        """Words, positions, dropout. Each tensor parallel rank has a slice of the vocabulary and
        sums up what all found.

        With sequence parallelism, by a reduce-scatter, and backward an all-gather; learned
        positions keep the all-reduce.
        """
        e, hidden = self.e, self.tokens * self.e.model.hidden_size
        scattered = e.sequence_parallel and e.model.position_embedding != "learned_absolute"
        gradient = (
            0
            if e.lora
            else hidden * 8 + self.vocab * e.model.hidden_size * self.weight_gradient_bytes
        )
        forward, backward = (
            Work(passes=hidden * 8 / self.bandwidth),
            Work(passes=gradient / self.bandwidth),
        )
        if e.tp > 1:
            forward += self.sending(self.half() if scattered else self.all_reduce())
            backward += self.sending(self.half()) if e.sequence_parallel else Work()
        return forward, backward

    def output(self) -> tuple[Work, Work]:
        """The product with the vocabulary, and the loss, whose softmax tensor parallel ranks do
        together."""
        e, h, logits = self.e, self.e.model.hidden_size, self.tokens * self.vocab
        forward_bytes, backward_bytes = LOSS_BYTES[e.cross_entropy_fusion]
        gradient = logits * backward_bytes + self.vocab * h * self.weight_gradient_bytes
        forward = Work(
            products=self.product(self.tokens, self.vocab, h),
            passes=logits * forward_bytes / self.bandwidth,
        )
        products = self.product(self.tokens, h, self.vocab)
        products += 0 if e.lora else self.product(h, self.vocab, self.tokens)
        backward = Work(products=products, passes=gradient / self.bandwidth)
        if e.tp > 1:
            forward += self.sending(MESSAGE_S) * (2 if e.cross_entropy_fusion else 3)
            forward += self.sending(self.half()) if e.sequence_parallel else Work()
            backward += self.input_gradient()
        return forward, backward

    def messages(self) -> tuple[Work, Work]:
        """Hidden states to and from the neighbours in the pipeline, once for each virtual stage."""
        e = self.e
        launch = self.c.stage_launch_ms if e.vpp == 1 else self.c.chunk_launch_ms * e.vpp
        sent = e.vpp * 2 * self.tokens * e.model.hidden_size / self.spread
        message = Work(exchange=sent / self.link, launches=launch / 1e3)
        return message, message

    def layer(self) -> tuple[Work, Work]:
        """One micro-batch through one layer, forward and backward."""
        launches = (
            Work(launches=self.c.forward_launch_ms / 1e3),
            Work(launches=self.c.backward_launch_ms / 1e3),
        )
        forward, backward = _added(
            *launches,
            [
                self.matrices,
                self.quantized,
                self.adapters,
                self.attention,
                self.projection_norms,
                self.elementwise,
                self.experts,
                self.tensor_parallel,
                self.context_parallel,
            ],
        )
        if self.e.cuda_graphs:
            forward, backward = (
                forward._replace(launches=GRAPH_S),
                backward._replace(launches=GRAPH_S),
            )
        return forward, backward + (
            forward if self.e.recompute == "full" else self.selectively_recomputed()
        )

    def selectively_recomputed(self) -> Work:
        """Attention scores (upstream's choice where no module is named), the norm before experts,
        their activation."""
        e, m, modules = self.e, self.e.model, self.e.selectively_recomputed
        again = (
            self.attention()[0] + self.context_parallel()[0] if "core_attn" in modules else Work()
        )
        moved = 0.0
        if m.num_experts and "layernorm" in modules:
            moved += self.tokens / self.spread * m.hidden_size * 4
        if m.num_experts and "moe_act" in modules:
            moved += self.c.routed_passes * self.routed() * m.moe_ffn / e.etp * 6
        return again + Work(passes=moved / self.bandwidth)

    def matrices(self) -> tuple[Work, Work]:
        """The linear layers: a product forward, two of the same size backward; of frozen ones
        one."""
        shapes, fp8 = list(self.shapes()), self.e.precision == "fp8"
        forward = sum(self.product(rows, out, inner, fp8) for rows, out, inner in shapes)
        backward = sum(self.product(rows, inner, out, fp8) for rows, out, inner in shapes)
        if not self.e.lora:
            backward += sum(self.product(inner, out, rows, fp8) for rows, out, inner in shapes)
        added_up = (
            sum(out * inner for _, out, inner in shapes)
            * self.weight_gradient_bytes
            / self.bandwidth
        )
        return Work(products=forward), Work(products=backward, passes=added_up)

    def quantized(self) -> tuple[Work, Work]:
        """Inputs of the linear layers, then gradients of their outputs, become fp8; weights once a
        step."""
        e, shapes = self.e, list(self.shapes())
        if e.precision != "fp8":
            return Work(), Work()
        each, launches = (
            FP8_BYTES[e.fp8_recipe] / self.bandwidth,
            len(shapes) * FP8_OPERATIONS[e.fp8_recipe] * OPERATION_S,
        )
        inputs = sum(rows * inner + out * inner / e.num_microbatches for rows, out, inner in shapes)
        gradients = sum(rows * out for rows, out, _ in shapes)
        return Work(passes=inputs * each, launches=launches), Work(
            passes=gradients * each, launches=launches
        )

    def adapters(self) -> tuple[Work, Work]:
        """LoRA beside every target: norm and dropout of its input, two products, a scale and a sum,
        op by op.

        Source: harness/finetune/lora.py; what crosses tensor parallel ranks is a rank wide.
        """
        e, forward, backward = self.e, Work(), Work()
        for target, (inner, out) in adapter_widths(e).items():
            rank, dropped = e.lora.rank, e.lora.dropout > 0
            normed = target in COLUMN_PARALLEL  # these modules contain the norm of their input
            before, after = (
                (self.tokens / self.spread, self.tokens)
                if normed
                else (self.tokens, self.tokens / self.spread)
            )
            read = before * inner * (4 * normed + 5 * dropped)
            forward += Work(
                products=self.product(before, rank, inner) + self.product(after, out, rank),
                passes=(read + after * out * (4 + 6)) / self.bandwidth,
                launches=(4 + normed + dropped) * OPERATION_S,
            )
            backward += Work(
                products=self.product(after, rank, out)
                + self.product(out, rank, after)
                + self.product(before, inner, rank)
                + self.product(rank, inner, before),
                passes=(before * inner * (6 + 6 * normed + 5 * dropped) + after * out * 4)
                / self.bandwidth,
                launches=(6 + normed + dropped) * OPERATION_S,
            )
            if e.tp > 1:
                crossing = self.sending(2 * self.tokens * rank / self.link + MESSAGE_S)
                forward, backward = forward + crossing, backward + crossing
        return forward, backward

    def shapes(self) -> Iterator[tuple[float, float, float]]:
        """Rows, columns and inner size of each linear layer's product; of experts none."""
        m, tp = self.e.model, self.e.tp
        yield self.tokens, m.qkv_size / tp, m.hidden_size
        yield self.tokens, m.hidden_size, m.query_size / tp
        if not m.num_experts:
            yield self.tokens, m.ffn / tp * m.fc1_matrices, m.hidden_size
            yield self.tokens, m.hidden_size, m.ffn / tp

    def attention(self) -> tuple[Work, Work]:
        """Flash attention: two products forward, five backward, and each score once in either;
        heads in widths of 64.

        Read and written are Q, K, V and the output; backward these, the gradients of all four, and
        dQ summed up in fp32.
        """
        e, m = self.e, self.e.model
        seen = e.seq_length / 2
        if m.window_size and m.window_size < e.seq_length:
            # every other layer
            seen = (seen + m.window_size * (1 - m.window_size / (2 * e.seq_length))) / 2
        scores = self.tokens * seen * m.num_attention_heads / e.tp
        products = 4 * math.ceil(m.head_size / 64) * 64 * scores / self.rate
        each = 1e-12 * scores * (1 if m.dropout else self.c.no_dropout_share)
        queries, keys = self.tokens * m.query_size / e.tp, self.tokens * m.key_size / e.tp
        moved = 4 * queries + 4 * keys
        forward = products + each * self.c.score_forward_ps + moved / self.bandwidth
        backward = (
            2.5 * products
            + each * self.c.score_backward_ps
            + (2 * moved + 12 * queries) / self.bandwidth
        )
        return Work(attention=forward + KERNEL_S), Work(attention=backward + KERNEL_S)

    def elementwise(self) -> tuple[Work, Work]:
        """Two norms, two dropouts with bias and residual, the activation, what is done to queries
        and keys: bytes in bf16.

        Masks have one byte. Without dropout, its gradient is none of its own.
        """
        e, m = self.e, self.e.model
        hidden = self.tokens * m.hidden_size / self.spread
        forward = hidden * (8 + 2 * (7 if m.dropout else 6))
        backward = hidden * (12 + 12 + (2 * 5 if m.dropout else 0))
        if not m.num_experts:
            inner = self.tokens * m.ffn / e.tp
            forward += inner * (6 if m.gated else 4)
            backward += inner * ((10 if m.gated else 6) + (2 if m.add_bias_linear else 0))
        queries, keys = self.tokens * m.query_size / e.tp, self.tokens * m.key_size / e.tp
        if m.add_bias_linear:
            backward += 2 * (queries + 2 * keys)
        if m.position_embedding != "learned_absolute":
            forward, backward = forward + 4 * (queries + keys), backward + 4 * (queries + keys)
        if m.qk_norm == "head":
            forward, backward = forward + 4 * (queries + keys), backward + 6 * (queries + keys)
        if m.attention_output_gate:
            forward, backward = (
                forward + queries * GATE_FORWARD_BYTES,
                backward + queries * GATE_BACKWARD_BYTES,
            )
        return Work(passes=forward / self.bandwidth), Work(passes=backward / self.bandwidth)

    def projection_norms(self) -> tuple[Work, Work]:
        """Queries and keys normalised over the heads of all tensor parallel ranks, who add up their
        squares."""
        e, m = self.e, self.e.model
        if m.qk_norm != "projection":
            return Work(), Work()
        each = self.tokens * (m.query_size + m.key_size) / e.tp / self.bandwidth
        launches = 2 * PROJECTION_NORM_OPERATIONS * OPERATION_S
        sums = self.sending(MESSAGE_S) * 2 if e.tp > 1 else Work()
        return (
            Work(passes=each * PROJECTION_NORM_FORWARD_BYTES, launches=launches) + sums,
            Work(passes=each * PROJECTION_NORM_BACKWARD_BYTES, launches=2 * launches) + sums,
        )

    def experts(self) -> tuple[Work, Work]:
        """Grouped products, permutation and weights of routed tokens, exchanges with the other
        ranks that hold experts.

        Tokens are taken to be dealt out evenly. Under expert tensor parallelism each group gathers
        its tokens, whose numbers differ, by broadcasts.
        """
        e, m, h = self.e, self.e.model, self.e.model.hidden_size
        if not m.num_experts:
            return Work(), Work()
        rows = self.routed()
        width, matrices, held = m.moe_ffn / e.etp, m.fc1_matrices + 1, m.num_experts / e.ep
        weights = held * width * h * matrices
        moved = 2 * (rows * (2 * h + matrices * width) + weights) / self.bandwidth
        products = (
            max(2 * rows * width * h * matrices / (self.rate * self.c.experts_share), moved)
            + 2 * held * KERNEL_S
        )
        permuted = self.c.routed_passes * rows / self.bandwidth
        sent = rows / e.etp * h * 2 * (e.ep - 1) / e.ep + (rows * h * 2 if e.etp > 1 else 0)
        launches = (
            self.c.router_launch_ms + (2 * self.c.collective_launch_ms if e.ep * e.etp > 1 else 0)
        ) / 1e3
        launched = self.c.expert_launch_ms * held / 1e3
        gradients = weights * self.weight_gradient_bytes / self.bandwidth
        forward = Work(
            products=products,
            passes=permuted * (12 * h + 6 * width),
            exchange=2 * sent / self.link,
            launches=launches + launched,
        )
        backward = Work(
            products=2 * products,
            passes=permuted * (16 * h + 10 * width) + gradients,
            exchange=2 * sent / self.link,
            launches=launches + 2 * launched,
        )
        return forward, backward

    def routed(self) -> float:
        """Rows that the experts of a rank get; sequence parallelism splits tokens before the router
        sees them."""
        return self.tokens / self.spread * self.e.model.moe_router_topk * self.e.etp

    def tensor_parallel(self) -> tuple[Work, Work]:
        """Sums after attention and MLP, and as many backward; experts exchange tokens instead
        (``experts``)."""
        e = self.e
        if e.tp == 1:
            return Work(), Work()
        forward = (
            self.sending(self.half()) * 2
            if e.sequence_parallel
            else self.sending(self.all_reduce())
        )
        sums = 1 if e.model.num_experts else 2
        return forward * sums, self.input_gradient() * sums

    def input_gradient(self) -> Work:
        """Sums up the gradient of a split product's input, while its weights' gradient is computed.

        Sequence parallelism scatters the sum, and gathers gradient and input.
        """
        if not self.e.sequence_parallel:
            return self.sending(self.all_reduce(), self.c.tensor_exposed)
        gathered_input = Work(launches=self.c.collective_launch_ms / 1e3)
        return self.sending(self.half(), self.c.tensor_exposed) * 2 + gathered_input

    def sending(self, seconds: float, exposed: float = 1.0) -> Work:
        """A collective that takes so long, of which a share is not hidden."""
        return Work(exchange=seconds * exposed, launches=self.c.collective_launch_ms / 1e3)

    def half(self) -> float:
        """Seconds to all-gather or reduce-scatter one hidden state over the tensor parallel
        ranks."""
        e = self.e
        return (e.tp - 1) / e.tp * 2 * self.tokens * e.model.hidden_size / self.link + MESSAGE_S

    def all_reduce(self) -> float:
        """Seconds to all-reduce it."""
        return (
            self.reduced(self.e.tp) * 2 * self.tokens * self.e.model.hidden_size / self.link
            + MESSAGE_S
        )

    def reduced(self, ranks: int) -> float:
        """Times its message that a rank sends for an all-reduce."""
        return (ranks + 1) / ranks if self.switch_reduces and ranks > 2 else 2 * (ranks - 1) / ranks

    def context_parallel(self) -> tuple[Work, Work]:
        """The ring hides what it sends and merges partial results; the others send first, then
        compute."""
        e, m = self.e, self.e.model
        if e.cp == 1:
            return Work(), Work()
        launches = self.c.context_launch_ms / 1e3
        queries, keys = self.tokens * m.query_size / e.tp, self.tokens * m.key_size / e.tp
        if e.cp_comm_type == "p2p":
            turns = e.cp - 1
            launches += e.cp * self.c.ring_launch_ms / 1e3
            return (
                Work(passes=turns * (12 * queries / self.bandwidth + KERNEL_S), launches=launches),
                Work(
                    passes=turns * (6 * (queries + 2 * keys) / self.bandwidth + KERNEL_S),
                    launches=launches,
                ),
            )
        if e.cp_comm_type == "all_gather":
            gathered = 4 * keys * (e.cp - 1) / self.link + MESSAGE_S
            return Work(exchange=gathered, launches=launches), Work(
                exchange=2 * gathered, launches=launches
            )
        exchanged = 4 * (queries + keys)
        work = Work(
            passes=2 * exchanged / self.bandwidth,
            launches=launches,
            exchange=exchanged * (e.cp - 1) / e.cp / self.link + 4 * MESSAGE_S,
        )
        return work, work

    def product(self, rows: float, columns: float, inner: float, fp8: bool = False) -> float:
        """A matrix product, [rows, inner] x [inner, columns]: by arithmetic or by memory, whichever
        takes longer."""
        arithmetic = (
            2
            * rows
            * columns
            * inner
            / ((self.fp8_rate if fp8 else self.rate) * _filled(rows, columns))
        )
        memory = (
            2 * rows * columns + (1 if fp8 else 2) * (columns * inner + rows * inner)
        ) / self.bandwidth
        return max(arithmetic, memory) + KERNEL_S


def _added(
    forward: Work, backward: Work, parts: Iterable[Callable[[], tuple[Work, Work]]]
) -> tuple[Work, Work]:
    """Both passes with what ``parts`` add to them."""
    for part in parts:
        more_forward, more_backward = part()
        forward, backward = forward + more_forward, backward + more_backward
    return forward, backward


def _filled(rows: float, columns: float) -> float:
    """Share of the last wave of tiles, and of the last tiles, that has work; with the best of
    ``TILES``."""
    return max(
        speed
        * rows
        * columns
        / (math.ceil(tiles / MULTIPROCESSORS) * MULTIPROCESSORS * height * width)
        for height, width, speed in TILES
        for tiles in [math.ceil(rows / height) * math.ceil(columns / width)]
    )
