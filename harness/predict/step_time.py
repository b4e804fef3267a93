"""What a training step takes, and where its time goes: predicted from an experiment's sizes before
it runs.

A rank's work is counted from the sizes: matrix products in whole waves of tiles, attention score by
score, bytes that the rest reads and writes, bytes sent (harness/predict/work.py). A few constants
of a machine say how fast it does each, and how long its CPU takes to launch it (``Calibration``);
they are fitted to measured steps (harness/evidence/calibrate.py) and kept in
experiments/calibrations.yaml. A pass through a stage takes what the GPU needs, or the CPU to launch
it, and a little more where both need about as much; the pipeline's schedule
(harness/predict/timeline.py) puts passes in order.

What replicas send when: megatron/core/distributed/finalize_model_grads.py, core_v0.19.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from harness.experiment import extra_arguments
from harness.experiment.experiment import SHARDING
from harness.experiment.hardware import GPUS_OF_A_NODE
from harness.predict import timeline
from harness.predict.flops import adapter_parameters, parameters_on
from harness.predict.work import OPERATION_S, Calibration, Rank, Work

if TYPE_CHECKING:
    from harness.experiment.experiment import Experiment
    from harness.experiment.hardware import Card

ADAM_BYTES = {"fp32": 30, "bf16": 16}
"""Per parameter, by the precision of moments: these and fp32 weights are read and written, then
weights copied to bf16; or moments, bf16 weights and the two bytes that these lack of fp32 are read
and written."""
MUON_BYTES = 90
"""Per parameter of a matrix, likewise: decay, momentum, its mix with the gradient, norm, to bf16
and back, two scales, the update, op by op (OrthogonalizedOptimizer.step and newton_schulz in
emerging_optimizers 0.3.0)."""
NEWTON_SCHULZ_STEPS = 5
MUON_OPERATIONS = 12 + 3 * NEWTON_SCHULZ_STEPS
"""What is launched for one matrix."""
RECOMPUTED = frozenset({"core_attn", "layernorm", "moe_act"})
"""The modules of selective recomputation that are counted."""


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step, by what the slowest rank does or waits for."""

    products: float
    """Matrix products, of experts too."""
    attention: float
    """Scores, weights and values."""
    passes: float
    """What memory bandwidth bounds: norms, activations, dropouts, sums of gradients, the softmax of
    the loss."""
    exchange: float
    """Activations, keys and values, tokens on the way to other ranks, as far as nothing else runs
    meanwhile."""
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


def unknown(e: Experiment) -> list[str]:
    """What of ``e`` has a cost that no constant here covers; empty where ``predict`` applies."""
    said = {
        "fp32 arithmetic": e.precision == "fp32",
        "fp8 beside tensor parallelism or experts": (
            e.precision == "fp8" and (e.tp > 1 or e.model.num_experts is not None)
        ),
        "FSDP beside tensor or context parallelism": e.fully_sharded and e.tp * e.cp > 1,
        "unfused attention": e.attention_backend == "unfused",
        f"recomputation of {', '.join(sorted({*e.recompute_modules} - RECOMPUTED))}": (
            {*e.recompute_modules} - RECOMPUTED
        ),
        "attention sinks": e.model.attention_sinks,
        "links between nodes": e.nodes > 1,
        f"more than {GPUS_OF_A_NODE} GPUs in a node": e.ranks_per_node > GPUS_OF_A_NODE,
        "CUDA graphs beside pipelines, context parallelism or experts": (
            e.cuda_graphs and (e.pp * e.cp > 1 or e.model.num_experts is not None)
        ),
        "arguments of your own (ARGS)": bool(extra_arguments.unpredictable(e.extra_args)),
    }
    return [name for name, applies in said.items() if applies]


def kinds(e: Experiment) -> frozenset[str]:
    """What work ``e`` has that others have not: constants fitted to rows without it have never met
    it.

    Every choice of an experiment and its model is here (a test goes through their fields); sizes
    are not, but for the number of GPUs.
    """
    m = e.model
    said = {
        **_methods(e),
        "norms over whole projections": m.qk_norm == "projection",
        "norms of queries and keys": m.qk_norm == "head",
        "gated attention": m.attention_output_gate,
        f"gated MLPs ({m.activation})": m.gated,
        "grouped heads": m.key_size < m.query_size,
        "windowed attention": m.window_size is not None,
        "attention sinks": m.attention_sinks,
        f"{m.position_embedding} positions": m.position_embedding != "learned_absolute",
        "RMS norms": m.normalization == "RMSNorm",
        "layers without biases": not m.add_bias_linear,
        "an output layer of its own": m.untie_embeddings,
        "no dropout": not m.dropout,
        f"{e.precision} arithmetic": e.precision == "fp32",
        "a fused loss": e.cross_entropy_fusion,
        "unfused attention": e.attention_backend == "unfused",
        "bf16 moments": e.optimizer_state == "bf16",
        "bf16 gradients": e.gradients == "bf16",
        "full recomputation": e.recompute == "full",
        **{f"recomputation of {module}": True for module in e.selectively_recomputed},
        "sequence parallelism": e.sequence_parallel,
        "virtual stages": e.vpp > 1,
        "expert parallelism": e.ep > 1,
        "split experts": e.etp > 1,
        "routers trained to balance": (
            m.moe_aux_loss_coeff is not None or m.moe_z_loss_coeff is not None
        ),
        "routers with a softmax over all experts": m.moe_router_pre_softmax,
        f"{e.world_size} GPUs": e.world_size > 1,
        f"{e.nodes} nodes": e.nodes > 1,
    }
    return frozenset(name for name, applies in said.items() if applies)


def methods(e: Experiment) -> frozenset[str]:
    """Those of its kinds whose costs meet: what was measured of two of them apart says little of
    both together."""
    return frozenset(name for name, applies in _methods(e).items() if applies)


def _methods(e: Experiment) -> dict[str, bool]:
    sharded = e.dp * e.cp > 1
    return {
        f"fp8 {e.fp8_recipe}": e.precision == "fp8",
        SHARDING[e.sharding][0]: e.fully_sharded or (e.sharding == "optim" and sharded),
        "LoRA": e.lora is not None,
        "Muon": e.optimizer == "muon",
        "CUDA graphs": e.cuda_graphs,
        "experts": e.model.num_experts is not None,
        "replicas": e.dp > 1,
        "tensor parallelism": e.tp > 1,
        "pipelines": e.pp > 1,
        f"context parallelism by {e.cp_comm_type}": e.cp > 1,
    }


def predict(
    e: Experiment, gpu: Card, calibration: Calibration, *, switch_reduces: bool = False
) -> StepTime:
    """A step of ``e`` on cards of kind ``gpu``, in a machine with these constants, where
    ``unknown(e)`` is empty.

    Args:
        switch_reduces: whether all-reduces are added up in the NVLink switch (NCCL's NVLS, on from
        three ranks).
    """
    return _Step(e, gpu, calibration, switch_reduces).step()


def stage_times(
    e: Experiment, gpu: Card, calibration: Calibration, *, switch_reduces: bool = False
) -> timeline.Times:
    """Milliseconds of one micro-batch through each pipeline stage, messages included; arguments as
    of ``predict``."""
    return _Step(e, gpu, calibration, switch_reduces).stage_times(1e3)


class _Step(Rank):
    """And for all of a step; seconds throughout."""

    def step(self) -> StepTime:
        e, m, times = self.e, self.e.num_microbatches, self.stage_times()
        each = [
            forward + backward
            for forward, backward in zip(times.forward, times.backward, strict=True)
        ]
        slowest = max(range(e.pp), key=each.__getitem__)
        work = sum(self.stages[slowest], Work()) * m
        first, _ = self.stages[0]
        begins = self.together(first + Work(launches=self.c.step_launch_ms / 1e3)) - self.together(
            first
        )
        busy = each[slowest] * m
        end = timeline.duration(m, times, e.vpp) if e.pp > 1 else busy
        seconds = StepTime(
            products=work.products,
            attention=work.attention,
            passes=work.passes,
            exchange=work.exchange,
            launches=busy - work.gpu + begins,
            bubble=end - busy,
            gradients=self.gradients(),
            optimizer=self.optimizer() + self.c.step_ms / 1e3,
        )
        return StepTime(**{name: 1e3 * part for name, part in seconds.pieces.items()})

    def gradients(self) -> float:
        """Gradients to the replicas and back; where the optimizer is sharded to their shards, and
        weights back in bf16.

        Sharded gradients are reduced and sharded weights gathered every micro-batch, these for
        either pass; FSDP2 copies each into its buffers and out. First and last stage of a pipeline
        sum up the gradient of tied embeddings.
        """
        e, sent, copied = self.e, 0.0, 0.0
        reduced = e.num_microbatches if e.shards_gradients else 1
        gathered = 2 * e.num_microbatches if e.shards_weights else 1
        for parameters, replicas in self.held():
            if e.sharding != "no_shard":
                each = self.gradient_bytes * reduced + 2 * gathered
                sent += parameters * each * (replicas - 1) / replicas * self.c.gradients_exposed
            elif replicas > 1:
                sent += parameters * self.gradient_bytes * self.reduced(replicas)
            if e.sharding == "torch_fsdp2" and replicas > 1:
                copied += parameters * 4 * (reduced + gathered)
        if e.pp > 1 and not e.model.untie_embeddings:
            sent += self.vocab * e.model.hidden_size * self.gradient_bytes * self.reduced(2)
        return sent / self.link + copied / self.bandwidth

    def optimizer(self) -> float:
        """Adam or Muon, norm and clipping of gradients on each rank's share; clearing, checking and
        averaging of gradients.

        Checked for NaN and scaled by start_grad_sync in
        megatron/core/distributed/param_and_grad_buffer.py.
        """
        e, size, moved = self.e, self.gradient_bytes, 0.0
        for parameters, replicas in self.held():
            share = 1 / replicas if e.sharding != "no_shard" else 1
            moved += parameters * share * (4 * size + ADAM_BYTES[e.optimizer_state])
            moved += (
                parameters
                * (share if e.shards_gradients else 1)
                * (4 if e.dp * e.cp > 1 else 2)
                * size
            )
        return moved / self.bandwidth + (self.muon() if e.optimizer == "muon" else 0)

    def muon(self) -> float:
        """What Muon takes beyond Adam: five Newton-Schulz iterations for each matrix, each rank's
        share of them.

        Three products each: X X^T, a square, its product with X (newton_schulz_step in
        emerging_optimizers); tensor parallel ranks iterate on their part of a matrix
        (--muon-tp-mode blockwise), on queries, keys and values apart.
        """
        e, held = self.e, parameters_on(self.e, 0)
        share = 1 / (e.dp * e.cp) if e.sharding != "no_shard" else 1
        products = launches = 0.0
        for rows, columns, number in self.orthogonalized():
            narrow, wide = min(rows, columns), max(rows, columns)
            each = 2 * self.product(narrow, narrow, wide) + self.product(narrow, narrow, narrow)
            products += number * NEWTON_SCHULZ_STEPS * each
            launches += number * MUON_OPERATIONS * OPERATION_S
        more = (
            (held.matrices + held.expert_matrices)
            * (MUON_BYTES - ADAM_BYTES[e.optimizer_state])
            / self.bandwidth
        )
        return self.together(Work(products=products, passes=more, launches=launches)) * share

    def orthogonalized(self) -> Iterator[tuple[float, float, float]]:
        """Rows and columns of the matrices that a rank holds of a pipeline stage, and how many
        there are of each."""
        e, m, h, layers = (
            self.e,
            self.e.model,
            self.e.model.hidden_size,
            self.e.model.num_layers / self.e.pp,
        )
        yield m.query_size * (2 if m.attention_output_gate else 1) / e.tp, h, layers
        yield m.key_size / e.tp, h, 2 * layers
        yield h, m.query_size / e.tp, layers
        width, number = (
            (m.moe_ffn / e.etp, layers * m.num_experts / e.ep)
            if m.num_experts
            else (m.ffn / e.tp, layers)
        )
        yield width * m.fc1_matrices, h, number
        yield h, width, number

    def held(self) -> tuple[tuple[float, int], tuple[float, int]]:
        """Trained parameters of a rank and how many ranks hold the same: without experts,
        experts."""
        e, held = self.e, parameters_on(self.e, 0)
        dense, experts = (adapter_parameters(e), 0) if e.lora else (held.dense, held.experts)
        return (dense, e.dp * e.cp), (experts, e.expert_replicas)
