"""What a training step takes, and where its time goes: predicted from an experiment's sizes before it runs.

A rank's work is counted from the sizes: matrix products in whole waves of tiles, attention score by score, bytes that
the rest reads and writes, bytes sent. A few constants of a machine say how fast it does each, and how long its CPU takes
to launch it (``Calibration``); they are fitted to measured steps (harness/evidence/calibrate.py) and kept in
experiments/calibrations.yaml. A pass through a stage takes what the GPU needs, or the CPU to launch it, and a little
more where both need about as much; the pipeline's schedule (harness/experiment/timeline.py) puts passes in order.

Sources: waves of tiles, NVIDIA's Matrix Multiplication Background User's Guide, section "Dimension Quantization Effects";
bytes of an all-reduce, 2 (n-1)/n of the message over links and (n+1)/n where the switch adds up, NVIDIA's nccl-tests,
doc/PERFORMANCE.md; what is sent when, megatron/core/tensor_parallel/layers.py and
megatron/core/transformer/moe/token_dispatcher.py, core_v0.19.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from harness.experiment import timeline
from harness.experiment.flops import padded_vocab_size, parameters_on

if TYPE_CHECKING:
    from harness.experiment.catalog import Experiment
    from harness.experiment.hardware import Gpu

Share = Annotated[float, Field(gt=0)]

MULTIPROCESSORS = 132
"""Of a Hopper GPU with SXM; no other kind was calibrated."""
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9), (64, 256, 0.9), (256, 64, 0.9))
"""Rows and columns that a multiprocessor computes at once, and how fast against the largest."""
KERNEL_S = 3e-6
"""From a kernel's launch to its first result, about."""
MESSAGE_S = 20e-6
"""A collective with nothing to send, about."""
ADAM_BYTES, CLEAR_BYTES = 44, 8
"""Read and written per parameter: by the norm, the clipping and Adam on fp32; by clearing and copying gradients."""
WEIGHT_GRADIENT_BYTES = 12
"""Per weight and micro-batch: its gradient in bf16 is written, read, and added to the fp32 sum (no Apex)."""
ATTENTION_FORWARD_BYTES, ATTENTION_BACKWARD_BYTES = 8, 28
"""Per token and unit of the queries' width: Q, K, V, output; these, the gradients of all four, and dQ summed up in fp32."""
LOSS_FORWARD_BYTES, LOSS_BACKWARD_BYTES = 24, 16
"""Per logit: the softmax in fp32, in steps (megatron/core/tensor_parallel/cross_entropy.py)."""


class Calibration(BaseModel):
    """How fast a machine is: the constants that its measured steps determine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    matrix_share: Share = 0.7
    """Of the peak, what matrix products reach in whole waves of tiles."""
    bandwidth_share: Share = 0.7
    """Of the memory bandwidth, what everything else reaches."""
    score_forward_ps: Share = 1.0
    """Attention, besides its products: exponential and dropout of one score, in picoseconds."""
    score_backward_ps: Share = 2.0
    no_dropout_share: Share = 0.5
    """Of these, what is left without dropout."""
    link_gb_s: Share = 330
    """What a rank sends in a second to the others of its node, while they send to it."""
    tensor_exposed: Share = 0.7
    """Of what tensor parallelism sends in the backward pass, how much is not hidden behind the weights' gradients."""
    gradients_exposed: Share = 0.3
    """Of what the distributed optimizer sends, how much is not hidden behind the passes."""
    experts_share: Share = 0.6
    """Of the matrix products' speed, what products of grouped experts reach."""
    routed_passes: Share = 1.0
    """Bytes that permuting and weighting routed tokens reads and writes, against the count by hand."""
    forward_launch_ms: Share = 0.9
    """The CPU's time for a layer's forward pass."""
    backward_launch_ms: Share = 1.3
    collective_launch_ms: Share = 0.1
    context_launch_ms: Share = 1.0
    """Context parallelism, beside its exchanges, a layer and pass."""
    ring_launch_ms: Share = 0.2
    """One turn of the ring."""
    router_launch_ms: Share = 1.0
    expert_launch_ms: Share = 0.02
    """One expert of a rank, a layer's forward pass; twice as much backward."""
    stage_launch_ms: Share = 5.0
    """Plain pipelines: a pass's message, and the wait for it (batch_p2p_sync in p2p_communication.py)."""
    chunk_launch_ms: Share = 3.0
    """Interleaved pipelines, a virtual stage's pass: its message overlaps."""
    step_launch_ms: Share = 15.0
    """Once a step, hidden where the GPU has work."""
    step_ms: Share = 5.0
    """Once a step, never hidden: the optimizer's launches, the norm's way to the CPU."""
    overlap: Share = 2.5
    """How sharply the slower of GPU and CPU decides: 1 + the exponent of their norm."""


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step, by what the slowest rank does or waits for."""

    products: float
    """Matrix products, of experts too."""
    attention: float
    """Scores, weights and values."""
    passes: float
    """What memory bandwidth bounds: norms, activations, dropouts, sums of gradients, the softmax of the loss."""
    exchange: float
    """Activations, keys and values, tokens on the way to other ranks, as far as nothing else runs meanwhile."""
    launches: float
    """The GPU waits for the CPU."""
    bubble: float
    """A pipeline stage waits for another."""
    gradients: float
    """Gradients and weights on the way to other replicas, likewise."""
    optimizer: float

    @property
    def pieces(self) -> dict[str, float]:
        """All of them by name."""
        return asdict(self)

    @property
    def total(self) -> float:
        return sum(self.pieces.values())


@dataclass(frozen=True)
class _Work:
    """Seconds of a rank's GPU for something, and of its CPU to launch it."""

    products: float = 0.0
    attention: float = 0.0
    passes: float = 0.0
    exchange: float = 0.0
    launches: float = 0.0

    @property
    def gpu(self) -> float:
        return self.products + self.attention + self.passes + self.exchange

    def __add__(self, other: _Work) -> _Work:
        return _Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: float) -> _Work:
        return _Work(*(getattr(self, field.name) * times for field in fields(self)))


def unknown(e: Experiment) -> list[str]:
    """What of ``e`` has a cost that no constant here covers; empty where ``predict`` applies."""
    said = {
        f"{e.precision} arithmetic": e.precision != "bf16",
        "sharded weights (FSDP)": e.fully_sharded,
        "adapters (LoRA)": e.lora is not None,
        "Muon": e.optimizer == "muon",
        "attention sinks": e.model.attention_sinks,
        "a norm over whole projections": e.model.qk_norm == "projection",
        "links between nodes": e.nodes > 1,
        "arguments of your own (ARGS)": bool(e.extra_args),
    }
    return [name for name, applies in said.items() if applies]


def predict(e: Experiment, gpu: Gpu, calibration: Calibration, *, switch_reduces: bool = False) -> StepTime:
    """A step of ``e`` on cards of kind ``gpu``, in a machine with these constants, where ``unknown(e)`` is empty.

    Args:
        switch_reduces: whether all-reduces are added up in the NVLink switch (NCCL's NVLS, on from three ranks).
    """
    return _Machine(e, gpu, calibration, switch_reduces).step()


def stage_times(e: Experiment, gpu: Gpu, calibration: Calibration, *, switch_reduces: bool = False) -> timeline.Times:
    """Milliseconds of one micro-batch through each pipeline stage, messages included; arguments as of ``predict``."""
    return _Machine(e, gpu, calibration, switch_reduces).stage_times(1e3)


class _Machine:
    """The cost of each part of ``e`` on one machine; seconds throughout."""

    def __init__(self, e: Experiment, gpu: Gpu, calibration: Calibration, switch_reduces: bool) -> None:
        self.e, self.c, self.switch_reduces = e, calibration, switch_reduces
        self.rate = gpu.bf16 * 1e12 * calibration.matrix_share
        self.bandwidth = gpu.bandwidth_gb_s * 1e9 * calibration.bandwidth_share
        self.link = calibration.link_gb_s * 1e9
        self.tokens = e.micro_batch_size * e.seq_length / e.cp
        self.spread = e.tp if e.sequence_parallel else 1
        self.vocab = padded_vocab_size(e.model.vocab_size, e.tp) / e.tp

    def step(self) -> StepTime:
        e = self.e
        passes = [self.stage(stage) for stage in range(e.pp)]
        if e.pp == 1:
            forward, backward = passes[0]
            first = forward + _Work(launches=self.c.step_launch_ms / 1e3)
            work = (forward + backward) * e.num_microbatches
            busy = self.together(first) + self.together(forward) * (e.num_microbatches - 1)
            busy += self.together(backward) * e.num_microbatches
            end = busy
        else:
            times = self.stage_times()
            each = [forward + backward for forward, backward in zip(times.forward, times.backward, strict=True)]
            slowest = max(range(e.pp), key=each.__getitem__)
            work = (passes[slowest][0] + passes[slowest][1]) * e.num_microbatches
            busy = each[slowest] * e.num_microbatches
            end = timeline.simulate(e.num_microbatches, times, e.vpp).end
        seconds = StepTime(
            products=work.products, attention=work.attention, passes=work.passes, exchange=work.exchange,
            launches=busy - work.gpu, bubble=end - busy, gradients=self.gradients(),
            optimizer=self.optimizer() + self.c.step_ms / 1e3,
        )
        return StepTime(**{name: 1e3 * part for name, part in seconds.pieces.items()})

    def stage_times(self, unit: float = 1.0) -> timeline.Times:
        """Each stage's passes of a micro-batch, in ``1 / unit`` seconds."""
        passes = [self.stage(stage) for stage in range(self.e.pp)]
        return timeline.Times(*(tuple(unit * self.together(each) for each in side) for side in zip(*passes, strict=True)))

    def together(self, work: _Work) -> float:
        """GPU and CPU run side by side: the slower one's time, a little more where they are alike."""
        slow, fast = max(work.gpu, work.launches), min(work.gpu, work.launches)
        power = 1 + self.c.overlap
        return slow * (1 + (fast / slow) ** power) ** (1 / power)

    def stage(self, stage: int) -> tuple[_Work, _Work]:
        """The passes of one micro-batch through all layers of a stage, forward and backward."""
        e, h = self.e, self.e.model.hidden_size
        forward, backward = (work * (e.model.num_layers / e.pp) for work in self.layer())
        hidden = self.tokens * h
        if stage == 0:
            forward += _Work(passes=hidden * 8 / self.bandwidth)
            backward += _Work(passes=(hidden * 8 + self.vocab * h * WEIGHT_GRADIENT_BYTES) / self.bandwidth)
        if stage == e.pp - 1:
            logits = self.tokens * self.vocab
            forward += _Work(products=self.product(self.tokens, self.vocab, h),
                             passes=logits * LOSS_FORWARD_BYTES / self.bandwidth)
            backward += _Work(
                products=self.product(self.tokens, h, self.vocab) + self.product(h, self.vocab, self.tokens),
                passes=(logits * LOSS_BACKWARD_BYTES + self.vocab * h * WEIGHT_GRADIENT_BYTES) / self.bandwidth,
            )
        if e.pp > 1:
            launch = self.c.stage_launch_ms if e.vpp == 1 else self.c.chunk_launch_ms * e.vpp
            message = _Work(exchange=e.vpp * 2 * hidden / self.spread / self.link, launches=launch / 1e3)
            forward, backward = forward + message, backward + message
        return forward, backward

    def layer(self) -> tuple[_Work, _Work]:
        """One micro-batch through one layer, forward and backward."""
        forward, backward = _Work(launches=self.c.forward_launch_ms / 1e3), _Work(launches=self.c.backward_launch_ms / 1e3)
        parts = (self.matrices, self.attention, self.elementwise, self.experts, self.tensor_parallel, self.context_parallel)
        for part in parts:
            more_forward, more_backward = part()
            forward, backward = forward + more_forward, backward + more_backward
        if self.e.recompute == "full":
            backward += forward
        return forward, backward

    def matrices(self) -> tuple[_Work, _Work]:
        """The linear layers: a product forward, two of the same size backward."""
        shapes = list(self.shapes())
        forward = sum(self.product(rows, out, inner) for rows, out, inner in shapes)
        backward = sum(self.product(rows, inner, out) + self.product(inner, out, rows) for rows, out, inner in shapes)
        weights = sum(out * inner for _, out, inner in shapes)
        return _Work(products=forward), _Work(products=backward, passes=weights * WEIGHT_GRADIENT_BYTES / self.bandwidth)

    def shapes(self) -> Iterator[tuple[float, float, float]]:
        """Rows, columns and inner size of each linear layer's product; of experts none."""
        m, tp = self.e.model, self.e.tp
        queries = m.query_size * (2 if m.attention_output_gate else 1)
        yield self.tokens, (queries + 2 * m.key_size) / tp, m.hidden_size
        yield self.tokens, m.hidden_size, m.query_size / tp
        if not m.num_experts:
            yield self.tokens, m.ffn / tp * (2 if m.gated else 1), m.hidden_size
            yield self.tokens, m.hidden_size, m.ffn / tp

    def attention(self) -> tuple[_Work, _Work]:
        """Flash attention: two products forward, five backward, and each score once in either; heads in widths of 64."""
        e, m = self.e, self.e.model
        seen = e.seq_length / 2
        if m.window_size and m.window_size < e.seq_length:
            seen = (seen + m.window_size) / 2
        scores = self.tokens * seen * m.num_attention_heads / e.tp
        products = 4 * math.ceil(m.head_size / 64) * 64 * scores / self.rate
        each = 1e-12 * scores * (1 if m.dropout else self.c.no_dropout_share)
        width = self.tokens * m.query_size / e.tp
        forward = products + each * self.c.score_forward_ps + width * ATTENTION_FORWARD_BYTES / self.bandwidth
        backward = 2.5 * products + each * self.c.score_backward_ps + width * ATTENTION_BACKWARD_BYTES / self.bandwidth
        return _Work(attention=forward + KERNEL_S), _Work(attention=backward + KERNEL_S)

    def elementwise(self) -> tuple[_Work, _Work]:
        """Two norms, two dropouts with bias and residual, the activation: bytes a token, in bf16, masks of one byte."""
        m, mask = self.e.model, 1 if self.e.model.dropout else 0
        hidden = self.tokens * m.hidden_size / self.spread
        forward, backward = hidden * (8 + 2 * (6 + mask)), hidden * (12 + 2 * (4 + mask) + 12)
        if not m.num_experts:
            inner = self.tokens * m.ffn / self.e.tp
            forward += inner * (6 if m.gated else 4)
            backward += inner * 8 + self.tokens * (m.query_size + 2 * m.key_size) / self.e.tp * 2
        return _Work(passes=forward / self.bandwidth), _Work(passes=backward / self.bandwidth)

    def experts(self) -> tuple[_Work, _Work]:
        """Grouped products, permutation and weights of routed tokens, exchanges with the other ranks that hold experts.

        Tokens are taken to be dealt out evenly. Under expert tensor parallelism each group gathers its tokens, whose
        numbers differ, by broadcasts.
        """
        e, m, h = self.e, self.e.model, self.e.model.hidden_size
        if not m.num_experts:
            return _Work(), _Work()
        mine, rows = self.tokens * m.moe_router_topk, self.tokens * m.moe_router_topk * e.etp
        width, matrices, held = m.moe_ffn / e.etp, 3 if m.gated else 2, m.num_experts / e.ep
        moved = rows * (2 * h + 2 * width) * 2 / self.bandwidth
        products = max(2 * rows * width * h * matrices / (self.rate * self.c.experts_share), moved) + 2 * held * KERNEL_S
        permuted = self.c.routed_passes * rows / self.bandwidth
        sent = mine * h * 2 * (e.ep - 1) / e.ep + (rows * h * 2 if e.etp > 1 else 0)
        launches = (self.c.router_launch_ms + (2 * self.c.collective_launch_ms if e.ep * e.etp > 1 else 0)) / 1e3
        launched = self.c.expert_launch_ms * held / 1e3
        gradients = held * width * h * matrices * WEIGHT_GRADIENT_BYTES / self.bandwidth
        forward = _Work(products=products, passes=permuted * (12 * h + 6 * width), exchange=2 * sent / self.link,
                        launches=launches + launched)
        backward = _Work(products=2 * products, passes=permuted * (16 * h + 10 * width) + gradients,
                         exchange=2 * sent / self.link, launches=launches + 2 * launched)
        return forward, backward

    def tensor_parallel(self) -> tuple[_Work, _Work]:
        """All-reduces after attention and MLP, and as many backward; with sequence parallelism as two halves each.

        Backward, sequence parallelism gathers the inputs of two products once more, hidden behind others.
        """
        e = self.e
        if e.tp == 1:
            return _Work(), _Work()
        in_switch = self.switch_reduces and e.tp > 2 and not e.sequence_parallel
        times = (e.tp + 1) / e.tp if in_switch else 2 * (e.tp - 1) / e.tp
        each = times * 2 * self.tokens * e.model.hidden_size / self.link + MESSAGE_S
        forward, backward = (4, 6) if e.sequence_parallel else (2, 2)
        launch = self.c.collective_launch_ms / 1e3
        return (_Work(exchange=2 * each, launches=forward * launch),
                _Work(exchange=2 * each * self.c.tensor_exposed, launches=backward * launch))

    def context_parallel(self) -> tuple[_Work, _Work]:
        """The ring hides what it sends and merges partial results; the others send first, then compute."""
        e, m = self.e, self.e.model
        if e.cp == 1:
            return _Work(), _Work()
        launches = self.c.context_launch_ms / 1e3
        queries, keys = self.tokens * m.query_size / e.tp, self.tokens * m.key_size / e.tp
        if e.cp_comm_type == "p2p":
            turns = e.cp - 1
            launches += e.cp * self.c.ring_launch_ms / 1e3
            return (_Work(passes=turns * (12 * queries / self.bandwidth + KERNEL_S), launches=launches),
                    _Work(passes=turns * (6 * (queries + 2 * keys) / self.bandwidth + KERNEL_S), launches=launches))
        if e.cp_comm_type == "all_gather":
            gathered = 4 * keys * (e.cp - 1) / self.link + MESSAGE_S
            return _Work(exchange=gathered, launches=launches), _Work(exchange=2 * gathered, launches=launches)
        exchanged = 4 * (queries + keys)
        work = _Work(passes=2 * exchanged / self.bandwidth, launches=launches,
                     exchange=exchanged * (e.cp - 1) / e.cp / self.link + 4 * MESSAGE_S)
        return work, work

    def gradients(self) -> float:
        """Gradients in fp32 to the replicas and back; with the distributed optimizer half of it, and weights in bf16."""
        (dense, replicas), (experts, expert_replicas) = self.held()
        sent = 2 * 4 * (dense * (replicas - 1) / replicas + experts * (expert_replicas - 1) / expert_replicas)
        return sent / self.link * (0.75 * self.c.gradients_exposed if self.e.sharding == "optim" else 1)

    def optimizer(self) -> float:
        (dense, replicas), (experts, expert_replicas) = self.held()
        mine = dense / replicas + experts / expert_replicas if self.e.sharding == "optim" else dense + experts
        return (mine * ADAM_BYTES + (dense + experts) * CLEAR_BYTES) / self.bandwidth

    def held(self) -> tuple[tuple[float, int], tuple[float, int]]:
        """Parameters of a rank and how many ranks hold the same: without experts, experts."""
        e, held = self.e, parameters_on(self.e, 0)
        return (held.dense, e.dp * e.cp), (held.experts, max(e.world_size // (e.pp * e.ep * e.etp), 1))

    def product(self, rows: float, columns: float, inner: float) -> float:
        """A matrix product, [rows, inner] x [inner, columns]: by arithmetic or by memory, whichever takes longer."""
        arithmetic = 2 * rows * columns * inner / (self.rate * _filled(rows, columns))
        memory = 2 * (rows * columns + columns * inner + rows * inner) / self.bandwidth
        return max(arithmetic, memory) + KERNEL_S


def _filled(rows: float, columns: float) -> float:
    """Share of the last wave of tiles, and of the last tiles, that has work; with the best of ``TILES``."""
    return max(
        speed * rows * columns / (math.ceil(tiles / MULTIPROCESSORS) * MULTIPROCESSORS * height * width)
        for height, width, speed in TILES
        for tiles in [math.ceil(rows / height) * math.ceil(columns / width)]
    )
