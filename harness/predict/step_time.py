"""How long a training step takes and where the time goes, predicted from an experiment's sizes.

A rank's work is counted from the sizes (harness/predict/work.py): operations of matrix products,
attention score by score, bytes that the rest reads and writes, bytes sent. ``make preflight``
measured how fast a machine does each, and how long its CPU takes to launch it
(harness/predict/rates.py). The few constants that it cannot measure (``Calibration``) are fitted to
measured steps (harness/evidence/calibrate.py) and kept in experiments/calibrations.yaml. A pass
through a stage takes the longer of the GPU's time and the CPU's time to launch it, and more where
both are about equal; the pipeline's schedule (harness/predict/timeline.py) orders the passes.

What replicas send when: megatron/core/distributed/finalize_model_grads.py, core_v0.19.0.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import NamedTuple

from harness.experiment import extra_arguments
from harness.experiment.experiment import SHARDING, Experiment
from harness.experiment.linear_layers import of_layer, of_mlp, of_predictor
from harness.experiment.pipeline import fullest_stage, stage_layers
from harness.predict import stages, timeline
from harness.predict.elementwise import larger
from harness.predict.flops import adapter_parameters, parameters_on
from harness.predict.network import Group
from harness.predict.pattern_work import PatternWork
from harness.predict.stages import on_stage, predictor_kind
from harness.predict.work import UPDATE_OPERATIONS, Speed, Work

ADAM_BYTES = {"fp32": 30, "bf16": 16}
"""Precision of the moments -> bytes moved per parameter. fp32: moments and fp32 weights are read
and written, weights copied to bf16. bf16: moments, bf16 weights and the two bytes of fp32 that
these lack are read and written."""
HOST_ADAM_BYTES = 34
"""Per parameter: weight, gradient and moments read, weight and moments written in fp32, and the
weight written in bf16. Copies between host and GPU are faster, and go on beside it."""
HOST_BYTES_PER_S = 34e9
"""Of one core: torchrun gives each rank one thread. A rough value: PyTorch's fused AdamW on a core
of a server; no run on a GPU node has measured it."""
MUON_BYTES = 90
"""Per parameter of a matrix: decay, momentum, its mix with the gradient, norm, to bf16 and back,
two scales, the update, operation by operation (OrthogonalizedOptimizer.step and newton_schulz in
emerging_optimizers 0.3.0)."""
NEWTON_SCHULZ_STEPS = 5
RANK_SPREAD = 0.01
"""Standard deviation of a step's time over ranks that do the same; a rough value."""


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step, by what the slowest rank does or waits for."""

    products: float
    """Matrix products, of experts too."""
    attention: float
    """Scores, weights and values."""
    passes: float
    """Bound by memory bandwidth: norms, activations, gradient sums, softmax of the loss."""
    exchange: float
    """Exposed communication of activations, keys and values, and tokens between ranks."""
    launches: float
    """The GPU waits for the CPU."""
    bubble: float
    """A pipeline stage waits for another."""
    gradients: float
    """Exposed communication of gradients and weights between replicas."""
    stragglers: float
    """All ranks wait for the slowest of many nodes."""
    optimizer: float

    @property
    def pieces(self) -> dict[str, float]:
        """All of them by name."""
        return asdict(self)

    @property
    def total(self) -> float:
        return sum(self.pieces.values())


def predict(experiment: Experiment, speed: Speed) -> StepTime:
    """A step of ``experiment`` on a machine of this speed.

    Only where ``unknown(experiment)`` is empty.
    """
    return StepWork(experiment, speed).step()


def stage_times(experiment: Experiment, speed: Speed) -> timeline.Times:
    """Milliseconds of one micro-batch through each pipeline stage, messages included.

    Where ``predict`` applies.
    """
    return StepWork(experiment, speed).stage_times(1e3)


def unknown(experiment: Experiment) -> list[str]:
    """The parts of ``experiment`` whose cost no constant covers; none where ``predict`` applies."""
    found = {
        "fp32 arithmetic": experiment.precision == "fp32",
        "arguments in ARGS that no formula covers": bool(
            extra_arguments.unpredictable(experiment.extra_args)
        ),
    }
    return [name for name, applies in found.items() if applies]


def without_effect(experiment: Experiment) -> list[str]:
    """What settings of ``experiment`` change that no formula predicts, of its time or memory."""
    if not experiment.delay_wgrad:
        return []
    return [
        "not predicted: how much DELAY_WGRAD=1 hides beside tokens that are sent, and what a layer"
        " keeps until its weights' gradients are computed"
    ]


def kinds(experiment: Experiment) -> frozenset[str]:
    """The kinds of work in ``experiment`` that not every experiment has.

    Constants fitted to rows without a kind say nothing about it. Every choice of an experiment and
    its model is here (a test goes through their fields); of sizes only the number of GPUs.
    """
    model = experiment.model
    found = {
        **_methods(experiment),
        "norms over whole projections": model.qk_norm == "projection",
        "norms of queries and keys": model.qk_norm == "head",
        "gated attention": model.attention_output_gate,
        f"gated MLPs ({model.activation})": model.gated,
        "squared ReLU": model.activation == "squared_relu",
        "latent attention": model.latent_attention is not None,
        "a shared expert": model.moe_shared_expert_intermediate_size is not None,
        "dense layers before experts": model.first_dense_layers > 0,
        "multi-token prediction": model.predictors > 0,
        "partly rotated heads": model.rotary_percent < 1,
        "grouped heads": model.key_size < model.query_size,
        "windowed attention": model.window_size is not None,
        "attention sinks": model.attention_sinks,
        f"{model.position_embedding} positions": model.rotates,
        "no positions": model.position_embedding == "none",
        "RMS norms": model.normalization == "RMSNorm",
        "layers without biases": not model.add_bias_linear,
        "an output layer of its own": model.untie_embeddings,
        "no dropout": not model.dropout,
        f"{experiment.precision} arithmetic": experiment.precision == "fp32",
        "a fused loss": experiment.cross_entropy_fusion,
        "Transformer Engine's loss": experiment.cross_entropy_fusion_impl == "te",
        "no attention mask": not experiment.attention_mask,
        "fused gradient accumulation": bool(experiment.gradient_fusion),
        "unfused attention": experiment.attention_backend == "unfused",
        "bf16 moments": experiment.optimizer_state == "bf16",
        "an optimizer on the host": experiment.offload > 0,
        "bf16 gradients": experiment.gradients == "bf16",
        "no overlap": not experiment.overlap,
        "several optimizer instances": experiment.optimizer_instances > 1,
        "fp8 weights": experiment.fp8_params,
        "full recomputation": experiment.recompute == "full",
        **{f"recomputation of {module}": True for module in experiment.selectively_recomputed},
        "sequence parallelism": experiment.sequence_parallel,
        "overlapped tensor parallelism": experiment.tp_overlap,
        "virtual stages": experiment.vpp > 1,
        "uneven pipeline stages": experiment.uneven_pipeline,
        "expert parallelism": experiment.ep > 1,
        f"experts multiplied by {experiment.grouped_gemm}": experiment.grouped_gemm != "streams",
        "a HybridModel": experiment.entry == "hybrid",
        "Mamba layers": model.mamba is not None,
        "dropped tokens": experiment.moe_capacity is not None,
        "a fused router": experiment.router_fusion,
        "an overlapped shared expert": experiment.shared_expert_overlap,
        "deterministic kernels": experiment.deterministic,
        f"tokens sent by {experiment.moe_backend}": experiment.moe_backend != "deepep",
        f"tokens routed by {experiment.moe_dispatcher}": experiment.moe_dispatcher != "alltoall",
        "overlapped expert parallelism": experiment.ep_overlap,
        "delayed weights' gradients": experiment.delay_wgrad,
        "split experts": experiment.etp > 1,
        "routers trained to balance": (
            model.moe_aux_loss_coeff is not None or model.moe_z_loss_coeff is not None
        ),
        "routers with a softmax over all experts": model.moe_router_pre_softmax,
        "sigmoid routers": model.moe_router_score_function == "sigmoid",
        "routers with biases that balance": model.moe_router_enable_expert_bias,
        "routers by groups of experts": model.moe_router_num_groups is not None,
        f"routers balanced by {model.moe_router_load_balancing_type}": (
            model.moe_router_load_balancing_type != "aux_loss"
        ),
        f"{experiment.world_size} GPUs": experiment.world_size > 1,
        f"{experiment.nodes} nodes": experiment.nodes > 1,
    }
    return frozenset(name for name, applies in found.items() if applies)


def work_kind(experiment: Experiment) -> str:
    """The kind of work that says most about how well a step can be predicted; each has one."""
    found = {
        "experts": experiment.model.num_experts is not None,
        "pipelines": experiment.pp > 1,
        "context parallelism": experiment.cp > 1,
        "tensor parallelism": experiment.tp > 1,
        "sharded replicas": experiment.sharding != "no_shard" and experiment.dp > 1,
        "LoRA": experiment.lora is not None,
        "Muon": experiment.optimizer == "muon",
        "fp8": experiment.precision == "fp8",
        "fp4": experiment.precision == "fp4",
        "CUDA graphs": bool(experiment.cuda_graphs),
        "replicas": experiment.dp > 1,
    }
    return next((name for name, applies in found.items() if applies), "one GPU")


def methods(experiment: Experiment) -> frozenset[str]:
    """Those of its kinds that interact: two measured separately say little about both together."""
    return frozenset(name for name, applies in _methods(experiment).items() if applies)


def _methods(experiment: Experiment) -> dict[str, bool]:
    sharding = experiment.sharding
    sharded = sharding == "optim" and experiment.replicas > 1
    return {
        f"fp8 {experiment.fp8_recipe}": experiment.precision == "fp8",
        f"fp4 {experiment.fp4_recipe}": experiment.precision == "fp4",
        SHARDING[sharding][0]: experiment.fully_sharded or sharded,
        "LoRA": experiment.lora is not None,
        "Muon": experiment.optimizer == "muon",
        "CUDA graphs": bool(experiment.cuda_graphs),
        "experts": experiment.model.num_experts is not None,
        "replicas": experiment.dp > 1,
        "tensor parallelism": experiment.tp > 1,
        "pipelines": experiment.pp > 1,
        f"context parallelism by {experiment.cp_comm_type}": experiment.cp > 1,
    }


def slowest_of(ranks: int) -> float:
    """How much longer than the mean the slowest of so many ranks takes, as a share.

    The expected largest of n normal values lies sqrt(2 ln n) standard deviations above the mean
    (David and Nagaraja 2003, Order Statistics, section 10.5). Constants fitted to single nodes
    have the share of a node in them.
    """
    return RANK_SPREAD * math.sqrt(2 * math.log(ranks)) if ranks > 1 else 0.0


class Traffic(NamedTuple):
    """Messages that computation may hide."""

    seconds: float = 0.0
    within_node_s: float = 0.0
    """What they would take over the links of a node."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*map(operator.add, self, other))


class StepWork(PatternWork):
    """The work of a rank in a whole step; in seconds."""

    @cached_property
    def fullest(self) -> int:
        """The pipeline stage with most layers, whose optimizer takes longest."""
        return fullest_stage(self.experiment)

    def step(self) -> StepTime:
        """The time of a step in ms."""
        experiment, times = self.experiment, self.stage_times()
        micro_batches = experiment.num_microbatches
        passes = zip(times.forward, times.backward, strict=True)
        each = [forward + backward for forward, backward in passes]
        slowest = max(range(experiment.pp), key=each.__getitem__)
        work = sum(self.stages[slowest], Work()) * micro_batches
        busy = end = each[slowest] * micro_batches
        if experiment.pp > 1:
            end = timeline.duration(micro_batches, times, experiment.vpp)
        seconds = StepTime(
            products=work.products,
            attention=work.attention,
            passes=work.passes,
            exchange=work.exchange,
            launches=busy - work.gpu,
            bubble=end - busy,
            gradients=self.gradients_s(times.forward[slowest], times.backward[slowest]),
            stragglers=0.0,
            optimizer=self.optimizer_s(),
        )
        seconds = replace(seconds, stragglers=seconds.total * self.late_share())
        return StepTime(**{name: 1e3 * part for name, part in seconds.pieces.items()})

    def gradients_s(self, forward_s: float, backward_s: float) -> float:
        """Exposed time of gradients to the replicas and back, or to shards and bf16 weights back.

        Sharded gradients are reduced once a micro-batch, sharded weights gathered twice, for either
        pass; FSDP2 also copies each into and out of buffers. The first and last stage of a pipeline
        sum up the gradient of tied embeddings.

        Args:
            forward_s, backward_s: a micro-batch's passes, behind which sharded traffic hides.
        """
        (gathered, reduced), (forward, backward, exposed_s) = self.rounds(), self.replicated()
        overlaps = self.overlaps()
        exposed_s = exposed_s + gathered * self.exposed_s(forward, overlaps * forward_s)
        return exposed_s + reduced * self.exposed_s(backward, overlaps * backward_s)

    def overlaps(self) -> float:
        """The share of a pass behind which exchanges of replicas may hide.

        None where CUDA graphs launch whole layers: two H200s with a sharded optimizer took as long
        as if nothing were hidden.
        """
        return float(self.experiment.overlap and not self.experiment.graphs_layers)

    def rounds(self) -> tuple[int, int]:
        """How often in a step weights are gathered for the forward pass, and gradients reduced."""
        experiment, micro_batches = self.experiment, self.experiment.num_microbatches
        return (
            micro_batches if experiment.shards_weights else 1,
            micro_batches if experiment.shards_gradients else 1,
        )

    def replicated(self) -> tuple[Traffic, Traffic, float]:
        """What replicas exchange beside a forward and a backward pass, and seconds beside none."""
        experiment, (gathered, reduced) = self.experiment, self.rounds()
        forward, backward, exposed_s = Traffic(), Traffic(), 0.0
        for parameters, group in self.trained():
            gradient = parameters * self.gradient_bytes
            if experiment.sharding == "no_shard":
                exposed_s += self.network.all_reduce_s(gradient, group)
            elif group.ranks > 1:
                instances = experiment.optimizer_instances
                of_one = Group(group.ranks // instances, group.stride)
                forward += self.traffic(self.weight_bytes() * parameters, of_one)
                backward += self.traffic(gradient, of_one)
                if instances > 1:
                    # neighbouring ranks are an instance, whose shards the others sum up, too, once
                    # a step (param_and_grad_buffer.py in megatron/core/distributed, and the outer
                    # group of the file of that name in its fsdp/src/megatron_fsdp)
                    others = Group(instances, group.stride * of_one.ranks)
                    shard = self.traffic(gradient / of_one.ranks / reduced, others)
                    backward += shard + shard
            if experiment.sharding == "torch_fsdp2" and group.ranks > 1:
                exposed_s += parameters * 4 * (reduced + 2 * gathered) / self.bytes_per_s
        if experiment.shards_weights:
            backward += forward
        if experiment.pp > 1 and not self.model.untie_embeddings:
            ends = Group(2, (experiment.pp - 1) * self.groups.stages.stride)
            gradient = self.vocabulary * self.model.hidden_size * self.gradient_bytes
            exposed_s += self.network.all_reduce_s(gradient, ends)
        return forward, backward, exposed_s

    def weight_bytes(self) -> float:
        """Bytes of a gathered weight: 2, and 1 of those that are kept in fp8."""
        if not self.experiment.fp8_params:
            return 2.0
        held = parameters_on(self.experiment, self.fullest)
        return 2 - (held.matrices + held.expert_matrices) / (held.dense + held.experts)

    def late_share(self) -> float:
        """How much longer the slowest of all ranks takes than that of a node, as a share."""
        ranks, of_node = self.experiment.world_size, self.network.node
        return max(0.0, slowest_of(ranks) - slowest_of(of_node))

    def traffic(self, message: float, group: Group) -> Traffic:
        """An all-gather or reduce-scatter of ``message`` bytes."""
        return Traffic(
            self.network.gather_s(message, group), self.network.within_node_s(message, group)
        )

    def exposed_s(self, traffic: Traffic, computing_s: float) -> float:
        """What computation cannot hide of traffic beside it.

        Kernels that send take multiprocessors and bandwidth from those that compute: a share of the
        traffic is exposed in any case, of what it would take over the links of a node.
        """
        at_least_s = self.constants.exposed * traffic.within_node_s
        return larger(at_least_s, traffic.seconds - computing_s)

    def optimizer_s(self) -> float:
        """Adam or Muon, norm and clipping on a rank's share; gradients cleared, checked, averaged;
        what the CPU does once a step.

        start_grad_sync in megatron/core/distributed/param_and_grad_buffer.py checks gradients for
        NaN and scales them.
        """
        experiment, size, moved, on_host = self.experiment, self.gradient_bytes, 0.0, 0.0
        for parameters, group in self.trained():
            shards = group.ranks // experiment.optimizer_instances
            share = 1 / shards if experiment.sharding != "no_shard" else 1
            on_gpu = ADAM_BYTES[experiment.optimizer_state] * (1 - experiment.offload)
            moved += parameters * share * (4 * size + on_gpu)
            on_host += parameters * share * experiment.offload
            held = share if experiment.shards_gradients else 1
            moved += parameters * held * (4 if experiment.replicas > 1 else 2) * size
        once = moved / self.bytes_per_s + on_host * HOST_ADAM_BYTES / HOST_BYTES_PER_S
        once += self.constants.step_ms * self.speed.host_s
        updated = self.own_weights() * on_stage(experiment, self.fullest).experts
        if experiment.sharding != "no_shard":
            updated /= experiment.expert_replicas
        once += updated * UPDATE_OPERATIONS * self.speed.operation_us / 1e6
        return once + (self.muon_s() if experiment.optimizer == "muon" else 0)

    def muon_s(self) -> float:
        """What Muon takes beyond Adam: Newton-Schulz iterations on a rank's share of the matrices.

        An iteration has three products: X X^T, a square, its product with X (newton_schulz_step in
        emerging_optimizers). Tensor parallel ranks iterate on their part of a matrix
        (--muon-tp-mode blockwise), on queries, keys and values separately.
        """
        experiment, held = self.experiment, parameters_on(self.experiment, self.fullest)
        share = 1 / experiment.replicas if experiment.sharding != "no_shard" else 1
        products = 0.0
        for rows, columns, number in self.orthogonalized():
            narrow, wide = min(rows, columns), max(rows, columns)
            each = 2 * self.product_s(narrow, narrow, wide) + self.product_s(narrow, narrow, narrow)
            products += number * NEWTON_SCHULZ_STEPS * each
        more_bytes = MUON_BYTES - ADAM_BYTES[experiment.optimizer_state]
        passes = (held.matrices + held.expert_matrices) * more_bytes / self.bytes_per_s
        layers = stage_layers(experiment)[self.fullest]
        launches = self.rates.more("muon").optimizer * layers * self.speed.host_s
        work = Work(products=products, passes=passes, launches=launches)
        return self.elapsed_s(work) * share

    def orthogonalized(self) -> Iterator[tuple[float, float, float]]:
        """Rows, columns and number of the matrices that a rank of the fullest stage holds.

        Without routers: each has as many rows as there are experts.
        """
        experiment, model, tp = self.experiment, self.model, self.experiment.tp
        for kind, layers in stages.on_stage(experiment, self.fullest)._asdict().items():
            if not layers:
                continue
            whole = predictor_kind(experiment) if kind == "predictors" else kind
            linears = of_layer(model, whole)
            if kind == "predictors":
                linears = {"eh_proj": of_predictor(model)} | linears
            if linears.pop("linear_qkv", None):
                queries = model.qkv_size - model.key_size - model.value_size
                for rows in (queries, model.key_size, model.value_size):
                    yield rows / tp, model.hidden_size, layers
            for linear in linears.values():
                columns, rows = linear.on_rank(tp)
                yield rows, columns, layers
            if whole == "experts":
                for linear in of_mlp(model, model.moe_ffn).values():
                    columns, rows = linear.on_rank(experiment.etp)
                    yield rows, columns, layers * model.num_experts / experiment.ep

    def trained(self) -> list[tuple[float, Group]]:
        """Trained parameters of a rank and the ranks that hold the same: dense ones, experts.

        Of the pipeline stages, the one with most layers.
        """
        experiment, held = self.experiment, parameters_on(self.experiment, self.fullest)
        dense, experts = held.dense, held.experts
        if experiment.lora:
            dense, experts = adapter_parameters(experiment, self.fullest), 0
        found = (dense, self.groups.replicas), (experts, self.groups.expert_replicas)
        return [(parameters, group) for parameters, group in found if parameters]
