"""What a rank's GPU and CPU do for one micro-batch of a pipeline stage, counted from sizes.

Sources: waves of tiles, NVIDIA's Matrix Multiplication Background User's Guide, section "Dimension
Quantization Effects". Bytes that a rank sends for an all-reduce, 2 (n-1)/n of the message over
links, NVIDIA's nccl-tests, doc/PERFORMANCE.md; where the switch adds up, (n+1)/n: its message once,
and for all others its n-th of the sum. What is sent when, megatron/core/tensor_parallel/layers.py
and megatron/core/transformer/moe/token_dispatcher.py, core_v0.19.0.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Annotated, NamedTuple

from pydantic import BaseModel, Field

from harness.experiment.experiment import Experiment
from harness.experiment.hardware import Card
from harness.experiment.model import COLUMN_PARALLEL
from harness.predict import timeline
from harness.predict.flops import adapter_widths, padded_vocab_size

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

MULTIPROCESSORS = 132
"""Of a Hopper GPU with SXM, as on the datasheet; no other kind was calibrated."""
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9), (64, 256, 0.9), (256, 64, 0.9))
"""Rows and columns that a multiprocessor computes at once; speed relative to the largest tile."""
KERNEL_S = 3e-6
"""From a kernel's launch to its first result; a rough value."""
MESSAGE_S = 20e-6
"""A collective with nothing to send; a rough value."""
GRAPH_S = 100e-6
"""The CPU's time to launch a CUDA graph through Python and autograd; a rough value."""
OPERATION_S = 10e-6
"""The CPU's time for a PyTorch operation that no measured row has; a rough value."""
FP8_BYTES = {"delayed": 4, "tensorwise": 6, "blockwise": 4}
"""Per element converted to fp8: read in bf16, written by rows and by columns; tensorwise, read once
more for the largest value (Float8CurrentScalingQuantizer in transformer_engine/pytorch/tensor)."""
FP8_OPERATIONS = {"delayed": 1, "tensorwise": 3, "blockwise": 1}
"""Operations launched to convert one tensor."""
GATE_FORWARD_BYTES, GATE_BACKWARD_BYTES = 34, 52
"""Per element of the attention's output: its gate in fp32, operation by operation
(_apply_output_gate in megatron/core/transformer/attention.py)."""
PROJECTION_NORM_FORWARD_BYTES, PROJECTION_NORM_BACKWARD_BYTES = 38, 74
PROJECTION_NORM_OPERATIONS = 10
"""The same for queries and keys normalised over all heads (harness/specs/projection_norm.py), and
the operations launched forward; backward twice as many."""
LOSS_BYTES = {False: (38, 14), True: (22, 10)}
"""Whether the loss is fused -> bytes per logit, forward and backward: the softmax in fp32, by steps
(megatron/core/tensor_parallel/cross_entropy.py, megatron/core/fusions/fused_cross_entropy.py)."""


class Calibration(BaseModel, frozen=True, extra="forbid"):
    """How fast a machine is: the constants fitted to its measured steps."""

    matrix_share: Positive = 0.7
    """Share of the peak that matrix products reach in whole waves of tiles."""
    bandwidth_share: Positive = 0.7
    """Share of the memory bandwidth that everything else reaches."""
    score_forward_ps: Positive = 1.0
    """Attention without its products: exponential and dropout of one score, in picoseconds."""
    score_backward_ps: Positive = 2.0
    no_dropout_share: Positive = 0.5
    """Share of these that is left without dropout."""
    link_gb_s: Positive = 330
    """What a rank sends in a second to its node's others, while they send to it."""
    tensor_exposed: Positive = 0.7
    """Share of tensor parallelism's backward communication that is exposed, not hidden behind the
    weights' gradients."""
    gradients_exposed: Positive = 0.3
    """Share of the distributed optimizer's communication that is exposed."""
    fp8_share: Positive = 0.85
    """``matrix_share`` in fp8, relative to that in bf16."""
    experts_share: Positive = 0.6
    """Speed of grouped experts' products, relative to other matrix products."""
    routed_passes: Positive = 1.0
    """Bytes that permuting and weighting routed tokens moves, relative to the count here."""
    forward_launch_ms: Positive = 0.9
    """The CPU's time for a layer's forward pass."""
    backward_launch_ms: Positive = 1.3
    collective_launch_ms: Positive = 0.1
    context_launch_ms: Positive = 1.0
    """Context parallelism without its exchanges, a layer and pass."""
    ring_launch_ms: Positive = 0.2
    """One turn of the ring."""
    router_launch_ms: Positive = 1.0
    expert_launch_ms: Positive = 0.02
    """One expert of a rank, a layer's forward pass; twice as much backward."""
    stage_launch_ms: Positive = 5.0
    """1F1B: a pass's message, and the wait for it (batch_p2p_sync in p2p_communication.py)."""
    chunk_launch_ms: Positive = 3.0
    """Interleaved 1F1B, a virtual stage's pass: its message overlaps."""
    step_launch_ms: Positive = 15.0
    """Once a step, before its first forward pass; hidden where the GPU has work."""
    step_ms: Positive = 5.0
    """Once a step, never hidden: the optimizer's launches, copying the gradient norm to the CPU."""
    overlap: Positive = 2.5
    """How sharply the slower of GPU and CPU decides: their p-norm has p = 1 + overlap."""


class Work(NamedTuple):
    """Seconds of a rank's GPU, by kind, and of its CPU to launch the kernels."""

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


def tokens_on(experiment: Experiment) -> float:
    """Tokens of a micro-batch on a rank."""
    return experiment.micro_batch_size * experiment.seq_length / experiment.cp


def linear_shapes(experiment: Experiment) -> Iterator[tuple[float, float, float]]:
    """Rows, columns and inner size of each linear layer's product, experts excluded."""
    model, tp, tokens = experiment.model, experiment.tp, tokens_on(experiment)
    yield tokens, model.qkv_size / tp, model.hidden_size
    yield tokens, model.hidden_size, model.query_size / tp
    if not model.num_experts:
        yield tokens, model.ffn / tp * model.fc1_matrices, model.hidden_size
        yield tokens, model.hidden_size, model.ffn / tp


class MicroBatchWork:
    """The work of a rank for one micro-batch, part by part; forward and backward, in seconds."""

    def __init__(
        self, experiment: Experiment, card: Card, constants: Calibration, switch_reduces: bool
    ) -> None:
        self.experiment, self.model, self.constants = experiment, experiment.model, constants
        self.switch_reduces = switch_reduces
        self.flop_per_s = card.bf16_tflops * 1e12 * constants.matrix_share
        fp8_tflops = card.fp8_tflops or 0
        self.fp8_flop_per_s = fp8_tflops * 1e12 * constants.matrix_share * constants.fp8_share
        self.bytes_per_s = card.memory_gb_per_s * 1e9 * constants.bandwidth_share
        self.link_bytes_per_s = constants.link_gb_s * 1e9
        self.tokens = tokens_on(experiment)
        self.token_split = experiment.tp if experiment.sequence_parallel else 1
        """Ranks over which sequence parallelism splits what lies between the split products."""
        vocabulary = padded_vocab_size(self.model.vocab_size, experiment.tp)
        self.vocabulary = vocabulary / experiment.tp
        self.gradient_bytes = 2 if experiment.gradients == "bf16" or experiment.fully_sharded else 4
        # without Apex: written in bf16, read again, and added to the sum, which is read and written
        self.weight_gradient_bytes = 0 if experiment.lora else 4 + 2 * self.gradient_bytes

    def stage_times(self, unit: float = 1.0) -> timeline.Times:
        """Each stage's passes of a micro-batch, in ``1 / unit`` seconds."""
        sides = zip(*self.stages, strict=True)
        times = (tuple(unit * self.elapsed_s(each) for each in side) for side in sides)
        return timeline.Times(*times)

    def elapsed_s(self, work: Work) -> float:
        """Time of ``work``: that of the slower of GPU and CPU, and more if they are about equal."""
        slow, fast = max(work.gpu, work.launches), min(work.gpu, work.launches)
        power = 1 + self.constants.overlap
        return slow * (1 + (fast / slow) ** power) ** (1 / power)

    @cached_property
    def stages(self) -> list[tuple[Work, Work]]:
        """One micro-batch through all layers of each pipeline stage, forward and backward."""
        pp = self.experiment.pp
        forward, backward = (work * (self.model.num_layers / pp) for work in self.layer())
        found = []
        for stage in range(pp):
            parts = [self.embedding] * (stage == 0) + [self.output] * (stage == pp - 1)
            parts += [self.pipeline_messages] * (pp > 1)
            found.append(_added(forward, backward, parts))
        return found

    def embedding(self) -> tuple[Work, Work]:
        """Word and position embeddings and dropout; tensor parallel ranks sum what each has found.

        With sequence parallelism they do so by a reduce-scatter, and backward by an all-gather;
        learned positions keep the all-reduce.
        """
        experiment, width = self.experiment, self.model.hidden_size
        hidden = self.tokens * width
        learned = self.model.position_embedding == "learned_absolute"
        gradient = hidden * 8 + self.vocabulary * width * self.weight_gradient_bytes
        forward = Work(passes=hidden * 8 / self.bytes_per_s)
        backward = Work(passes=(0 if experiment.lora else gradient) / self.bytes_per_s)
        if experiment.tp > 1:
            scattered = experiment.sequence_parallel and not learned
            forward += self.collective(self.gather_s() if scattered else self.all_reduce_s())
            if experiment.sequence_parallel:
                backward += self.collective(self.gather_s())
        return forward, backward

    def output(self) -> tuple[Work, Work]:
        """The product with the vocabulary and the loss; tensor parallel ranks share its softmax."""
        experiment, width = self.experiment, self.model.hidden_size
        logits = self.tokens * self.vocabulary
        forward_bytes, backward_bytes = LOSS_BYTES[experiment.cross_entropy_fusion]
        gradient = logits * backward_bytes + self.vocabulary * width * self.weight_gradient_bytes
        forward = Work(
            products=self.product_s(self.tokens, self.vocabulary, width),
            passes=logits * forward_bytes / self.bytes_per_s,
        )
        products = self.product_s(self.tokens, width, self.vocabulary)
        products += 0 if experiment.lora else self.product_s(width, self.vocabulary, self.tokens)
        backward = Work(products=products, passes=gradient / self.bytes_per_s)
        if experiment.tp > 1:
            # all-reduces of maximum, target logit and sum of exponentials; the fused loss joins two
            forward += self.collective(MESSAGE_S) * (2 if experiment.cross_entropy_fusion else 3)
            if experiment.sequence_parallel:
                forward += self.collective(self.gather_s())
            backward += self.input_gradient()
        return forward, backward

    def pipeline_messages(self) -> tuple[Work, Work]:
        """Hidden states to and from the neighbouring stages, once for each virtual stage."""
        vpp, constants = self.experiment.vpp, self.constants
        launch_ms = constants.stage_launch_ms if vpp == 1 else constants.chunk_launch_ms * vpp
        sent = vpp * 2 * self.tokens * self.model.hidden_size / self.token_split
        message = Work(exchange=sent / self.link_bytes_per_s, launches=launch_ms / 1e3)
        return message, message

    def layer(self) -> tuple[Work, Work]:
        """One micro-batch through one layer, forward and backward, recomputation included."""
        forward, backward = _added(
            Work(launches=self.constants.forward_launch_ms / 1e3),
            Work(launches=self.constants.backward_launch_ms / 1e3),
            [
                self.linear_layers,
                self.quantization,
                self.adapters,
                self.attention,
                self.projection_norms,
                self.elementwise,
                self.experts,
                self.tensor_parallel,
                self.context_parallel,
            ],
        )
        if self.experiment.cuda_graphs:
            forward = forward._replace(launches=GRAPH_S)
            backward = backward._replace(launches=GRAPH_S)
        if self.experiment.recompute == "full":
            return forward, backward + forward
        return forward, backward + self.selectively_recomputed()

    def selectively_recomputed(self) -> Work:
        """Attention's scores, the norm before experts and their activation, as far as named."""
        model, modules = self.model, self.experiment.selectively_recomputed
        again = Work()
        if "core_attn" in modules:
            again = self.attention()[0] + self.context_parallel()[0]
        moved = 0.0
        if model.num_experts and "layernorm" in modules:
            moved += self.tokens / self.token_split * model.hidden_size * 4
        if model.num_experts and "moe_act" in modules:
            rows = self.constants.routed_passes * self.routed_rows()
            moved += rows * model.moe_ffn / self.experiment.etp * 6
        return again + Work(passes=moved / self.bytes_per_s)

    def linear_layers(self) -> tuple[Work, Work]:
        """A product forward, two of the same size backward; of frozen weights one."""
        shapes, fp8 = list(linear_shapes(self.experiment)), self.experiment.precision == "fp8"
        forward = sum(self.product_s(rows, out, inner, fp8) for rows, out, inner in shapes)
        backward = sum(self.product_s(rows, inner, out, fp8) for rows, out, inner in shapes)
        if not self.experiment.lora:
            backward += sum(self.product_s(inner, out, rows, fp8) for rows, out, inner in shapes)
        weights = sum(out * inner for _, out, inner in shapes)
        accumulated = weights * self.weight_gradient_bytes / self.bytes_per_s
        return Work(products=forward), Work(products=backward, passes=accumulated)

    def quantization(self) -> tuple[Work, Work]:
        """Linear layers' inputs and the gradients of outputs, to fp8; weights once a step."""
        experiment, shapes = self.experiment, list(linear_shapes(self.experiment))
        recipe = experiment.fp8_recipe
        if experiment.precision != "fp8":
            return Work(), Work()
        element_s = FP8_BYTES[recipe] / self.bytes_per_s
        launches = len(shapes) * FP8_OPERATIONS[recipe] * OPERATION_S
        inputs = sum(
            rows * inner + out * inner / experiment.num_microbatches for rows, out, inner in shapes
        )
        gradients = sum(rows * out for rows, out, _ in shapes)
        return (
            Work(passes=inputs * element_s, launches=launches),
            Work(passes=gradients * element_s, launches=launches),
        )

    def adapters(self) -> tuple[Work, Work]:
        """LoRA: for every target norm and dropout of its input, two products, a scale and a sum.

        Op by op as in harness/finetune/lora.py; what crosses tensor parallel ranks is a rank wide.
        """
        experiment, forward, backward = self.experiment, Work(), Work()
        for target, (inner, out) in adapter_widths(experiment).items():
            rank, dropped = experiment.lora.rank, experiment.lora.dropout > 0
            normed = target in COLUMN_PARALLEL  # these modules contain the norm of their input
            before, after = self.tokens / self.token_split, self.tokens
            if not normed:
                before, after = after, before
            read = before * inner * (4 * normed + 5 * dropped)
            forward += Work(
                products=self.product_s(before, rank, inner) + self.product_s(after, out, rank),
                passes=(read + after * out * (4 + 6)) / self.bytes_per_s,
                launches=(4 + normed + dropped) * OPERATION_S,
            )
            read = before * inner * (6 + 6 * normed + 5 * dropped)
            backward += Work(
                products=self.product_s(after, rank, out)
                + self.product_s(out, rank, after)
                + self.product_s(before, inner, rank)
                + self.product_s(rank, inner, before),
                passes=(read + after * out * 4) / self.bytes_per_s,
                launches=(6 + normed + dropped) * OPERATION_S,
            )
            if experiment.tp > 1:
                sent_s = 2 * self.tokens * rank / self.link_bytes_per_s
                crossing = self.collective(sent_s + MESSAGE_S)
                forward, backward = forward + crossing, backward + crossing
        return forward, backward

    def attention(self) -> tuple[Work, Work]:
        """Flash attention: two products forward, five backward, and each score once in either.

        Source: Dao 2023 (arXiv:2307.08691), algorithms 1 and 2. Heads are computed in widths of 64.
        Read and written are Q, K, V and the output; backward these, the gradients of all four, and
        dQ accumulated in fp32.
        """
        experiment, model, constants = self.experiment, self.model, self.constants
        length, window = experiment.seq_length, model.window_size
        seen = length / 2
        if window and window < length:
            # every other layer
            seen = (seen + window * (1 - window / (2 * length))) / 2
        scores = self.tokens * seen * model.num_attention_heads / experiment.tp
        products = 4 * math.ceil(model.head_size / 64) * 64 * scores / self.flop_per_s
        score_ps = 1e-12 * scores * (1 if model.dropout else constants.no_dropout_share)
        queries, keys = self.queries_and_keys()
        moved = 4 * queries + 4 * keys
        forward = products + score_ps * constants.score_forward_ps + moved / self.bytes_per_s
        backward = (
            2.5 * products
            + score_ps * constants.score_backward_ps
            + (2 * moved + 12 * queries) / self.bytes_per_s
        )
        return Work(attention=forward + KERNEL_S), Work(attention=backward + KERNEL_S)

    def queries_and_keys(self) -> tuple[float, float]:
        """Elements of all queries and of all keys on a rank."""
        model, tp = self.model, self.experiment.tp
        return self.tokens * model.query_size / tp, self.tokens * model.key_size / tp

    def elementwise(self) -> tuple[Work, Work]:
        """Norms, dropouts with bias and residual, the activation, operations on queries and keys.

        Counted in bytes of bf16; masks have one byte. Without dropout, its gradient costs nothing.
        """
        model = self.model
        hidden = self.tokens * model.hidden_size / self.token_split
        forward = hidden * (8 + 2 * (7 if model.dropout else 6))
        backward = hidden * (12 + 12 + (2 * 5 if model.dropout else 0))
        if not model.num_experts:
            inner = self.tokens * model.ffn / self.experiment.tp
            forward += inner * (6 if model.gated else 4)
            bias = 2 if model.add_bias_linear else 0
            backward += inner * ((10 if model.gated else 6) + bias)
        queries, keys = self.queries_and_keys()
        if model.add_bias_linear:
            backward += 2 * (queries + 2 * keys)
        if model.position_embedding != "learned_absolute":
            forward, backward = forward + 4 * (queries + keys), backward + 4 * (queries + keys)
        if model.qk_norm == "head":
            forward, backward = forward + 4 * (queries + keys), backward + 6 * (queries + keys)
        if model.attention_output_gate:
            forward += queries * GATE_FORWARD_BYTES
            backward += queries * GATE_BACKWARD_BYTES
        return Work(passes=forward / self.bytes_per_s), Work(passes=backward / self.bytes_per_s)

    def projection_norms(self) -> tuple[Work, Work]:
        """Queries and keys normalised over all heads; tensor parallel ranks sum their squares."""
        tp, model = self.experiment.tp, self.model
        if model.qk_norm != "projection":
            return Work(), Work()
        byte_s = self.tokens * (model.query_size + model.key_size) / tp / self.bytes_per_s
        launches = 2 * PROJECTION_NORM_OPERATIONS * OPERATION_S
        sums = self.collective(MESSAGE_S) * 2 if tp > 1 else Work()
        return (
            Work(passes=byte_s * PROJECTION_NORM_FORWARD_BYTES, launches=launches) + sums,
            Work(passes=byte_s * PROJECTION_NORM_BACKWARD_BYTES, launches=2 * launches) + sums,
        )

    def experts(self) -> tuple[Work, Work]:
        """Grouped products, permutation and weighting of tokens, expert parallelism's exchanges.

        Assumes that routers spread tokens evenly. Under expert tensor parallelism each group
        gathers its tokens, whose numbers differ, by broadcasts.
        """
        model, constants = self.model, self.constants
        ep, etp, hidden = self.experiment.ep, self.experiment.etp, model.hidden_size
        if not model.num_experts:
            return Work(), Work()
        rows, byte_s = self.routed_rows(), self.bytes_per_s
        width, matrices = model.moe_ffn / etp, model.fc1_matrices + 1
        held = model.num_experts / ep
        weights = held * width * hidden * matrices
        moved = 2 * (rows * (2 * hidden + matrices * width) + weights) / byte_s
        flops = 2 * rows * width * hidden * matrices
        arithmetic = flops / (self.flop_per_s * constants.experts_share)
        products = max(arithmetic, moved) + 2 * held * KERNEL_S
        permuted = constants.routed_passes * rows / byte_s
        sent = rows / etp * hidden * 2 * (ep - 1) / ep + (rows * hidden * 2 if etp > 1 else 0)
        exchange = 2 * sent / self.link_bytes_per_s
        exchanges_ms = 2 * constants.collective_launch_ms if ep * etp > 1 else 0
        launches = (constants.router_launch_ms + exchanges_ms) / 1e3
        launched = constants.expert_launch_ms * held / 1e3
        gradients = weights * self.weight_gradient_bytes / byte_s
        forward = Work(
            products=products,
            passes=permuted * (12 * hidden + 6 * width),
            exchange=exchange,
            launches=launches + launched,
        )
        backward = Work(
            products=2 * products,
            passes=permuted * (16 * hidden + 10 * width) + gradients,
            exchange=exchange,
            launches=launches + 2 * launched,
        )
        return forward, backward

    def routed_rows(self) -> float:
        """Rows for the experts of a rank; sequence parallelism splits tokens before the router."""
        return self.tokens / self.token_split * self.model.moe_router_topk * self.experiment.etp

    def tensor_parallel(self) -> tuple[Work, Work]:
        """Sums after attention and MLP, and as many backward; experts exchange tokens instead."""
        if self.experiment.tp == 1:
            return Work(), Work()
        if self.experiment.sequence_parallel:
            forward = self.collective(self.gather_s()) * 2
        else:
            forward = self.collective(self.all_reduce_s())
        sums = 1 if self.model.num_experts else 2
        return forward * sums, self.input_gradient() * sums

    def input_gradient(self) -> Work:
        """Sums up the gradient of a split product's input while its weights' gradient is computed.

        Sequence parallelism scatters the sum, and gathers gradient and input.
        """
        exposed = self.constants.tensor_exposed
        if not self.experiment.sequence_parallel:
            return self.collective(self.all_reduce_s(), exposed)
        gathered_input = Work(launches=self.constants.collective_launch_ms / 1e3)
        return self.collective(self.gather_s(), exposed) * 2 + gathered_input

    def collective(self, seconds: float, exposed: float = 1.0) -> Work:
        """A collective that takes ``seconds``, of which the share ``exposed`` is not hidden."""
        launch_s = self.constants.collective_launch_ms / 1e3
        return Work(exchange=seconds * exposed, launches=launch_s)

    def gather_s(self) -> float:
        """Seconds to all-gather or reduce-scatter a hidden state over tensor parallel ranks."""
        tp, width = self.experiment.tp, self.model.hidden_size
        return (tp - 1) / tp * 2 * self.tokens * width / self.link_bytes_per_s + MESSAGE_S

    def all_reduce_s(self) -> float:
        """Seconds to all-reduce a hidden state over tensor parallel ranks."""
        share = self.all_reduce_share(self.experiment.tp)
        sent = share * 2 * self.tokens * self.model.hidden_size
        return sent / self.link_bytes_per_s + MESSAGE_S

    def all_reduce_share(self, ranks: int) -> float:
        """What a rank sends for an all-reduce, as a multiple of its message."""
        return (ranks + 1) / ranks if self.switch_reduces and ranks > 2 else 2 * (ranks - 1) / ranks

    def context_parallel(self) -> tuple[Work, Work]:
        """The ring hides its exchange and merges partial results; the others exchange first."""
        cp, constants, byte_s = self.experiment.cp, self.constants, self.bytes_per_s
        if cp == 1:
            return Work(), Work()
        launches = constants.context_launch_ms / 1e3
        queries, keys = self.queries_and_keys()
        match self.experiment.cp_comm_type:
            case "p2p":
                turns = cp - 1
                launches += cp * constants.ring_launch_ms / 1e3
                merged = turns * (12 * queries / byte_s + KERNEL_S)
                summed = turns * (6 * (queries + 2 * keys) / byte_s + KERNEL_S)
                return (
                    Work(passes=merged, launches=launches),
                    Work(passes=summed, launches=launches),
                )
            case "all_gather":
                gathered = 4 * keys * (cp - 1) / self.link_bytes_per_s + MESSAGE_S
                return (
                    Work(exchange=gathered, launches=launches),
                    Work(exchange=2 * gathered, launches=launches),
                )
        exchanged = 4 * (queries + keys)
        work = Work(
            passes=2 * exchanged / byte_s,
            launches=launches,
            exchange=exchanged * (cp - 1) / cp / self.link_bytes_per_s + 4 * MESSAGE_S,
        )
        return work, work

    def product_s(self, rows: float, columns: float, inner: float, fp8: bool = False) -> float:
        """Seconds of a matrix product, [rows, inner] x [inner, columns].

        Bound by arithmetic or by memory, whichever takes longer.
        """
        flop_per_s = self.fp8_flop_per_s if fp8 else self.flop_per_s
        arithmetic = 2 * rows * columns * inner / (flop_per_s * _filled(rows, columns))
        moved = 2 * rows * columns + (1 if fp8 else 2) * (columns * inner + rows * inner)
        return max(arithmetic, moved / self.bytes_per_s) + KERNEL_S


def _added(
    forward: Work, backward: Work, parts: Iterable[Callable[[], tuple[Work, Work]]]
) -> tuple[Work, Work]:
    """Both passes with what ``parts`` add to them."""
    for part in parts:
        more_forward, more_backward = part()
        forward, backward = forward + more_forward, backward + more_backward
    return forward, backward


def _filled(rows: float, columns: float) -> float:
    """Speed of a product relative to whole waves of the largest tiles, with the best of TILES.

    Tiles at the edges, and the last wave of tiles over the multiprocessors, are partly empty.
    """
    return max(
        speed
        * rows
        * columns
        / (math.ceil(tiles / MULTIPROCESSORS) * MULTIPROCESSORS * height * width)
        for height, width, speed in TILES
        for tiles in [math.ceil(rows / height) * math.ceil(columns / width)]
    )
