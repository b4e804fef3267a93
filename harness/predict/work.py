"""What a rank's GPU and CPU do for one micro-batch of a pipeline stage, counted from sizes.

Rates are measured (harness/predict/rates.py). What is sent when:
megatron/core/tensor_parallel/layers.py and megatron/core/transformer/moe/token_dispatcher.py,
core_v0.19.0; how long it takes: harness/predict/network.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, get_args

from pydantic import BaseModel

from harness.experiment.experiment import Experiment
from harness.experiment.linear_layers import LayerKind, of_layer, of_predictor
from harness.experiment.model import COLUMN_PARALLEL, LinearLayer, Positive
from harness.predict import stages, timeline
from harness.predict.activations import loss_kind
from harness.predict.elementwise import larger
from harness.predict.flops import adapter_widths, padded_vocab_size
from harness.predict.network import MESSAGE_S, Groups, Network
from harness.predict.operations import NVFP4_BYTES, padded_rows
from harness.predict.rates import QUANTISED_BYTES, Launches, Rates
from harness.predict.stages import predictor_kind

KERNEL_S = 3e-6
"""From a kernel's launch to its first result; a rough value."""
GRAPH_S = 100e-6
"""The CPU's time to launch a CUDA graph through Python and autograd; a rough value."""
OVERLAP = 5
"""How sharply the slower of GPU and CPU decides: their p-norm has p = 1 + OVERLAP; a rough value.
"""
ROUTED_PASSES = 1.5
"""Bytes that permuting and weighting routed tokens moves, relative to the count here: rows of the
published table say so."""
RING_SHARE = 0.15
"""Launches of a turn of the ring, relative to those that context parallelism has once."""
CHUNK_SHARE = 1 / 3
"""Launches of a virtual stage's message, which overlaps, relative to one of 1F1B, which waits
(batch_p2p_sync in p2p_communication.py)."""
SCORE_FORWARD_BYTES, SCORE_BACKWARD_BYTES = 13, 17
"""Per score of unfused attention in 16 bits: written by the product, masked softmax, dropout with a
mask of a byte, read by the second product; backward the same with gradients
(DotProductAttention in megatron/core/transformer/dot_product_attention.py)."""
GATE_FORWARD_BYTES, GATE_BACKWARD_BYTES = 34, 52
"""Per element of the attention's output: its gate in fp32, operation by operation
(_apply_output_gate in megatron/core/transformer/attention.py)."""
PROJECTION_NORM_FORWARD_BYTES, PROJECTION_NORM_BACKWARD_BYTES = 38, 74
PROJECTION_NORM_OPERATIONS = 10
"""The same for queries and keys normalised over all heads (harness/specs/projection_norm.py), and
the operations launched forward; backward twice as many."""
FUSED_TOPK_OPERATIONS, FUSED_SCORE_OPERATIONS = 8, 5
"""What the router's fused kernels launch less of, for top-k and for the balancing loss
(topk_routing_with_score_function, compute_routing_scores_for_aux_loss in
megatron/core/transformer/moe/moe_utils.py)."""
WEIGHT_OPERATIONS, UPDATE_OPERATIONS = 1.2, 0.75
"""Operations of the host for each weight of an expert that is a parameter of its own: its hook and
sum in a backward pass, its part of an optimizer step. 632 took 129 and 79 ms more with 2,048 such
weights (GROUPED_GEMM=cublas) than without (the same with args-babf81), at 50 us an operation: .3 in
experiments/runs/h200-2026-12-01."""
PLAIN_LINEARS = ("linear_proj", "linear_fc1", "linear_fc2")
LINEAR_SHARE = 1 / 6
"""Host time of a linear layer, relative to a plain layer, which has four; a rough value."""
WITHOUT_EXPERTS = {
    "num_experts": None,
    "first_dense_layers": 0,
    "moe_shared_expert_intermediate_size": None,
    "mtp_num_layers": None,
}
"""What makes of a model the one whose layers are all as its first dense ones."""
LOSS_BYTES = {"unfused": (38, 14), "native": (22, 10), "te": (6, 4)}
"""Kind of loss -> bytes per logit, forward and backward: the softmax in fp32, by steps
(megatron/core/tensor_parallel/cross_entropy.py, megatron/core/fusions/fused_cross_entropy.py); two
passes over bf16 logits and one that scales their gradient
(transformer_engine/pytorch/triton/cross_entropy.py)."""


class Calibration(BaseModel, frozen=True, extra="forbid"):
    """What no rate says of a machine: the constants fitted to its measured steps.

    Times are those on a host that launches as fast as that of the machine files.
    """

    products: Positive = 1.0
    """Speed of matrix products relative to the rates; 1 where ``Machine.rates_hold``."""
    attention: Positive = 1.0
    """Speed of attention, in the same way."""
    passes: Positive = 1.0
    """Speed of everything else on the GPU, in the same way."""
    host: Positive = 0.8
    """Host time of a layer, relative to that of the small layers in the machine files."""
    expert_ms: Positive = 0.25
    """Products of an expert in a layer, launched one by one, a third of them forward. cuBLAS looks
    for a kernel for each number of tokens that it has not seen, whatever an operation takes."""
    step_ms: Positive = 50.0
    """Once a step: launches of the optimizer, the gradient norm copied to the CPU, a new batch."""
    collective_ms: Positive = 0.4
    """A collective between ranks of a group."""
    context_ms: Positive = 2.5
    """Context parallelism, a layer and pass."""
    hooks_ms: Positive = 1.0
    """Hooks of a layer that send gradients and gather weights, forward; 1.5 times that backward."""
    stage_ms: Positive = 15.0
    """1F1B: a pass's message, and the wait for it."""
    exposed: Positive = 0.65
    """Share of communication beside computation that is not hidden by it: of tensor parallelism's
    backward pass, of gradients and of weights."""


RATES = frozenset({"products", "attention", "passes"})
"""Constants that stand for rates which no machine file states."""


class Work(NamedTuple):
    """Seconds of a rank's GPU, by kind, and of its CPU to launch the kernels."""

    products: float = 0.0
    attention: float = 0.0
    passes: float = 0.0
    exchange: float = 0.0
    launches: float = 0.0
    waits: float = 0.0
    """In which GPU and CPU wait for each other."""

    @property
    def gpu(self) -> float:
        return self.products + self.attention + self.passes + self.exchange

    def __add__(self, other: Work) -> Work:
        return Work(*map(operator.add, self, other))

    def __mul__(self, times: float) -> Work:
        return Work(*(part * times for part in self))


Shape = tuple[float, float, float]
"""Rows, columns and inner size of a product."""


def linear_shapes(experiment: Experiment, kind: LayerKind | None = None) -> Iterator[Shape]:
    """The product of each linear layer, routed experts excluded; ``kind``: None for the last layer.

    A layer that tensor parallelism does not split is computed for the tokens that sequence
    parallelism leaves on a rank.
    """
    tp, tokens = experiment.tp, experiment.rank_tokens
    share = tokens / (tp if experiment.sequence_parallel else 1)
    for linear in of_layer(experiment.model, kind or predictor_kind(experiment)).values():
        yield (
            share if linear.split == "nothing" else tokens,
            linear.outputs / (tp if linear.split == "outputs" else 1),
            linear.inputs / (tp if linear.split == "inputs" else 1),
        )


class Speed(NamedTuple):
    """How fast a machine is."""

    rates: Rates
    constants: Calibration
    network: Network
    operation_us: float
    """Host time of an operation, as the run measures it (harness/entry/launch_rate.py)."""
    scatters_messages: bool = False
    """Whether tensor parallel ranks each send a part of a pipeline's message, as Megatron-LM did
    until 2022 (Narayanan et al. 2021, arXiv:2104.04473, section 4.1)."""

    @property
    def host_s(self) -> float:
        """Seconds of this host for a millisecond of the machine files' host."""
        return self.constants.host * self.operation_us / self.rates.operation_us / 1e3


class MicroBatchWork:
    """The work of a rank for one micro-batch, part by part; forward and backward, in seconds."""

    def __init__(self, experiment: Experiment, speed: Speed) -> None:
        self.experiment, self.model, self.speed = experiment, experiment.model, speed
        self.rates, self.constants = rates, constants = speed.rates, speed.constants
        self.flop_per_s = rates.product_tflops * 1e12 * constants.products
        self.quantised_flop_per_s = self._quantised_tflops() * 1e12 * constants.products
        """Of linear layers in fp8 or fp4."""
        self.bytes_per_s = rates.memory_gb_s * 1e9 * constants.passes
        self.groups = Groups(experiment)
        self.operation_s = speed.operation_us * constants.host / 1e6

    def _quantised_tflops(self) -> float:
        if self.experiment.precision == "fp4":
            return self.rates.fp4_tflops or 0
        # no machine file has mxfp8: taken to be as fast as without blocks' scales
        recipe = (
            "tensorwise" if self.experiment.fp8_recipe == "mxfp8" else self.experiment.fp8_recipe
        )
        return self.rates.fp8_tflops.get(recipe, 0)

    @cached_property
    def network(self) -> Network:
        return self.speed.network.with_ranks_per_node(self.experiment.ranks_per_node)

    @cached_property
    def tokens(self) -> float:
        """Of a micro-batch on a rank."""
        return self.experiment.rank_tokens

    @cached_property
    def token_split(self) -> int:
        """Ranks over which sequence parallelism splits what lies between the split products."""
        return self.experiment.tp if self.experiment.sequence_parallel else 1

    @cached_property
    def vocabulary(self) -> float:
        """Words on a rank."""
        tp = self.experiment.tp
        return padded_vocab_size(self.model.vocab_size, tp) / tp

    @cached_property
    def gradient_bytes(self) -> int:
        """Of a weight's gradient, summed over micro-batches."""
        return 2 if self.experiment.gradients == "bf16" or self.experiment.fully_sharded else 4

    @cached_property
    def weight_gradient_bytes(self) -> int:
        """Moved to add a weight's gradient of a micro-batch to the sum.

        It is written in bf16, read again, and added to the sum, which is read and written. A
        product that accumulates hides half of the sum's traffic: B200's rates in
        experiments/rates.yaml.
        """
        if self.experiment.lora:
            return 0
        apart = 4 + 2 * self.gradient_bytes
        return self.gradient_bytes if self.experiment.gradient_fusion else apart

    def stage_times(self, unit: float = 1.0) -> timeline.Times:
        """Each stage's passes of a micro-batch, in ``1 / unit`` seconds."""
        sides = zip(*self.stages, strict=True)
        times = (tuple(unit * self.elapsed_s(each) for each in side) for side in sides)
        return timeline.Times(*times, shares=self.chunk_shares())

    def chunk_shares(self) -> timeline.Shares | None:
        """The share of its stage's time that each chunk takes, as forward passes; None if alike.

        The constants were fitted with both ends of a pipeline spread over all chunks of their stage
        where these hold equal numbers of layers.
        """
        if stages.alike(self.experiment):
            return None
        forward = {kind: self.elapsed_s(work[0]) for kind, work in self.layers.items()}
        weights = [
            [sum(forward[kind] for kind in chunk.kinds) for chunk in stage]
            for stage in stages.all_chunks(self.experiment)
        ]
        for chunk, end in zip((0, -1), (self.embedding, self.output), strict=True):
            weights[chunk][chunk] += self.elapsed_s(end()[0])
        return tuple(tuple(each / sum(stage) for each in stage) for stage in weights)

    def elapsed_s(self, work: Work) -> float:
        """Time of ``work``: that of the slower of GPU and CPU, and more if they are about equal."""
        power = 1 + OVERLAP
        return (work.gpu**power + work.launches**power) ** (1 / power) + work.waits

    @cached_property
    def stages(self) -> list[tuple[Work, Work]]:
        """One micro-batch through all layers of each pipeline stage, forward and backward."""
        last = self.experiment.pp - 1
        return [
            self.stage(stages.on_stage(self.experiment, stage), stage == 0, stage == last)
            for stage in range(last + 1)
        ]

    def stage(self, held: stages.Layers, first: bool, last: bool) -> tuple[Work, Work]:
        """One micro-batch through a stage with the layers ``held``."""
        parts = [self.embedding] * first + [self.output] * last
        parts += [self.later_outputs] * (last and self.model.predictors > 0)
        parts += [self.pipeline_messages] * self.experiment.is_pipelined
        return added(*self.passes(held), parts)

    def passes(self, held: stages.Layers) -> tuple[Work, Work]:
        """One micro-batch through the layers ``held``."""
        forward, backward = Work(), Work()
        for kind, layer in self.layers.items():
            number = getattr(held, kind)
            forward, backward = forward + layer[0] * number, backward + layer[1] * number
        return forward, backward

    @cached_property
    def layers(self) -> dict[str, tuple[Work, Work]]:
        """The work of one layer of each kind that the model has, by the field of stages.Layers."""
        kind, model = predictor_kind(self.experiment), self.model
        found = {kind: self.layer()}
        if model.num_experts and model.first_dense_layers:
            found["dense"] = self.dense_layer()
        if model.predictors:
            alone = self.of_predictors()
            layer = found[kind] if alone is self else alone.layer()
            found["predictors"] = added(*layer, [alone.predictor, alone.embedding])
        return found

    def of_predictors(self) -> MicroBatchWork:
        """The work of multi-token prediction, which NVFP4 leaves in bf16."""
        experiment = stages.of_predictors(self.experiment)
        return self if experiment is self.experiment else type(self)(experiment, self.speed)

    def dense_layer(self) -> tuple[Work, Work]:
        """A layer without experts of a model that has them."""
        dense = self.model.model_copy(update=WITHOUT_EXPERTS)
        alone = self.experiment.model_copy(update={"model": dense, "ep": 1, "etp": 1})
        return type(self)(alone, self.speed).layer()

    def predictor(self) -> tuple[Work, Work]:
        """What multi-token prediction has around its transformer layer and the embedding.

        The next token's embedding, three norms, and the projection that joins both: its input is
        gathered, its output as well (gather_from_tensor_model_parallel_region).
        """
        experiment, hidden = self.experiment, self.tokens * self.model.hidden_size
        joins = of_predictor(self.model)
        width, quantised = joins.outputs / experiment.tp, experiment.quantised
        normed = hidden / self.token_split / self.bytes_per_s
        gradient = joins.inputs * width * self.weight_gradient_bytes / self.bytes_per_s
        forward = Work(
            products=self.product_s(self.tokens, width, joins.inputs, quantised),
            passes=normed * (3 * 4 + 8),
            launches=3 * self.linear_launches.forward,
        )
        backward = Work(
            products=self.product_s(self.tokens, joins.inputs, width, quantised)
            + self.product_s(joins.inputs, width, self.tokens, quantised),
            passes=normed * (3 * 6 + 8) + gradient,
            launches=3 * self.linear_launches.backward,
        )
        if experiment.tp > 1:
            split = experiment.sequence_parallel
            sums = self.collective(self.tensor_gather_s(joins.inputs)) if split else Work()
            gathered = self.collective(self.gather_s())
            forward, backward = forward + sums + gathered, backward + sums + gathered
        return forward, backward

    def later_outputs(self) -> tuple[Work, Work]:
        """Logits and losses of the tokens after the next, one for each predicting layer."""
        forward, backward = self.output()
        return forward * self.model.predictors, backward * self.model.predictors

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
        forward_bytes, backward_bytes = LOSS_BYTES[loss_kind(experiment)]
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
        """Hidden states to and from the neighbouring stages, once for each virtual stage.

        Those of virtual stages hide behind the pass of another one (overlap_p2p_comm).
        """
        sent_s, launches, chunks, hiding = self.messages()
        forward, backward = (
            chunks * larger(0.0, sent_s - hiding * self.elapsed_s(one))
            for one in self.layers[predictor_kind(self.experiment)]
        )
        return Work(exchange=forward, launches=launches), Work(exchange=backward, launches=launches)

    def messages(self) -> tuple[float, float, int, float]:
        """Seconds of a message, and of launching a micro-batch's; how many these are, and how many
        layers are computed while one is sent."""
        vpp, each = self.experiment.vpp, self.speed.host_s * self.constants.stage_ms
        split = self.experiment.tp if self.speed.scatters_messages else self.token_split
        sent = 2 * self.tokens * self.model.hidden_size / split
        sent_s = self.network.send_s(sent, self.groups.stages)
        if vpp == 1:
            return sent_s, each, 1, 0.0
        layers = self.model.num_layers / self.experiment.pp / vpp
        return sent_s, each * vpp * CHUNK_SHARE, vpp, layers

    def layer(self) -> tuple[Work, Work]:
        """One micro-batch through one layer, forward and backward, recomputation included."""
        forward, backward = added(
            *self.launched(self.rates.plain),
            [
                self.hooks,
                self.linear_layers,
                self.quantization,
                self.adapters,
                self.attention,
                self.projection_norms,
                self.latent_attention,
                self.elementwise,
                self.tensor_parallel,
                self.latent_tensor_parallel,
                self.context_parallel,
            ],
        )
        if graphed := self.experiment.graphed:
            # with experts, a graph has attention and the router
            parts = {"attn"} if self.model.num_experts else {"attn", "mlp"}
            left = len(parts - {*graphed}) / len(parts)
            forward = forward._replace(launches=GRAPH_S + left * forward.launches)
            backward = backward._replace(launches=GRAPH_S + left * backward.launches)
        if self.model.num_experts:
            forward, backward = self.with_experts(forward, backward)
        if self.experiment.recompute == "full":
            return forward, backward + forward
        return forward, backward + self.selectively_recomputed()

    def with_experts(self, forward: Work, backward: Work) -> tuple[Work, Work]:
        """A layer's passes with experts and the tokens sent to them.

        Experts are launched slowly and the rest of a layer is computed slowly, and neither makes up
        for the other: forward the CPU waits for the numbers of tokens before it launches experts'
        products (``_maybe_dtoh_and_synchronize`` in
        megatron/core/transformer/moe/token_dispatcher.py). That it is so backward, too, was
        measured.
        """
        of_experts = self.experts()
        sent = (
            self.routed_tokens((work + experts).gpu)
            for work, experts in zip((forward, backward), of_experts, strict=True)
        )
        return (
            self.one_after_the_other(forward, of_experts[0] + next(sent)),
            self.one_after_the_other(backward, of_experts[1] + next(sent)),
        )

    def one_after_the_other(self, first: Work, then: Work) -> Work:
        """Both, where neither CPU nor GPU gets a lead for the second in the first."""
        both = first + then
        if self.experiment.ep_overlap:  # another micro-batch is computed meanwhile
            return both
        apart_s = self.elapsed_s(first) + self.elapsed_s(then)
        return both._replace(waits=both.waits + apart_s - self.elapsed_s(both))

    def launched(self, launches: Launches) -> tuple[Work, Work]:
        """Host time of a layer on this host."""
        host_s = self.speed.host_s
        return Work(launches=launches.forward * host_s), Work(launches=launches.backward * host_s)

    def hooks(self) -> tuple[Work, Work]:
        """Hooks of modules and parameters that exchange gradients and weights with replicas.

        Megatron-FSDP's and FSDP2's work in every micro-batch. The distributed optimizer's work in
        the last one only (no_sync of DistributedDataParallel), and not within a CUDA graph.
        """
        experiment = self.experiment
        alone = experiment.sharding == "no_shard" or experiment.replicas == 1
        if alone or not experiment.overlap:
            return Work(), Work()
        each = self.constants.hooks_ms
        if not experiment.fully_sharded:
            each /= experiment.num_microbatches
        return self.launched(Launches(each, 1.5 * each))

    def selectively_recomputed(self) -> Work:
        """The forward pass of the modules that are named, a second time."""
        model, modules = self.model, self.experiment.selectively_recomputed
        again = Work()
        if model.latent_attention and "mla_up_proj" in modules:
            again += self.projections_up()
        if "core_attn" in modules:
            again += self.attention()[0] + self.context_parallel()[0]
        if "mlp" in modules and not model.num_experts:
            again += self.mlp_forward(model.ffn)
        if "moe" in modules and model.num_experts:
            again += self.experts()[0] + self.routed_tokens(0)
        if {"moe", "shared_experts"} & {*modules}:
            again += self.mlp_forward(model.moe_shared_expert_intermediate_size or 0)
        moved = 0.0
        if model.num_experts and "layernorm" in modules:
            moved += self.tokens / self.token_split * model.hidden_size * 4
        if model.num_experts and "moe_act" in modules:
            rows = ROUTED_PASSES * self.routed_rows()
            moved += rows * model.moe_ffn / self.experiment.etp * 6
        return again + Work(passes=moved / self.bytes_per_s)

    def mlp_forward(self, width: int) -> Work:
        """The forward pass of an MLP of this ``width``, or of a shared expert, and its sums."""
        if not width:
            return Work()
        experiment, hidden = self.experiment, self.model.hidden_size
        inner, quantised = width / experiment.tp, experiment.quantised
        products = self.product_s(self.tokens, inner * self.model.fc1_matrices, hidden, quantised)
        products += self.product_s(self.tokens, hidden, inner, quantised)
        moved = self.tokens * inner * (6 if self.model.gated else 4)
        work = Work(products=products, passes=moved / self.bytes_per_s)
        if experiment.tp == 1:
            return work
        if experiment.sequence_parallel:
            return work + self.collective(self.gather_s()) * 2
        return work + self.collective(self.all_reduce_s())

    def linear_layers(self) -> tuple[Work, Work]:
        """The products of a transformer layer's linear layers."""
        return self.multiplied(list(linear_shapes(self.experiment)))

    def multiplied(self, shapes: Sequence[Shape]) -> tuple[Work, Work]:
        """A product forward, two of the same size backward; of frozen weights one."""
        quantised = self.experiment.quantised
        forward = sum(self.product_s(rows, out, inner, quantised) for rows, out, inner in shapes)
        backward = sum(self.product_s(rows, inner, out, quantised) for rows, out, inner in shapes)
        if not self.experiment.lora:
            backward += sum(
                self.product_s(inner, out, rows, quantised) for rows, out, inner in shapes
            )
        weights = sum(out * inner for _, out, inner in shapes)
        accumulated = weights * self.weight_gradient_bytes / self.bytes_per_s
        return Work(products=forward), Work(products=backward, passes=accumulated)

    def quantization(self) -> tuple[Work, Work]:
        """What a transformer layer converts to fp8 or fp4."""
        shapes = list(linear_shapes(self.experiment))
        if self.model.num_experts:
            shapes += self.expert_shapes()
        return self.quantized(shapes)

    def quantized(self, shapes: Sequence[Shape]) -> tuple[Work, Work]:
        """Linear layers' inputs and the gradients of outputs, to fp8 or fp4; weights once a step.

        NVFP4 is taken to launch as much as fp8 scaled by tensors: both look for the largest value
        first.
        """
        experiment = self.experiment
        if not experiment.quantised:
            return Work(), Work()
        element_s = QUANTISED_BYTES[experiment.recipe] / self.bytes_per_s
        kind = f"fp8 {experiment.fp8_recipe or 'tensorwise'}"
        forward, backward = self.launched(
            self.rates.more(kind if kind in self.rates.layers else "fp8 delayed")
        )
        inputs = sum(
            rows * inner + out * inner / experiment.num_microbatches for rows, out, inner in shapes
        )
        gradients = sum(rows * out for rows, out, _ in shapes)
        return (
            forward + Work(passes=inputs * element_s),
            backward + Work(passes=gradients * element_s),
        )

    def adapters(self) -> tuple[Work, Work]:
        """LoRA: for every target norm and dropout of its input, two products, a scale and a sum.

        Op by op as in harness/finetune/lora.py; what crosses tensor parallel ranks is a rank wide.
        """
        experiment = self.experiment
        widths = adapter_widths(experiment)
        share = len(widths) / len(get_args(LinearLayer))
        forward, backward = self.launched(self.rates.more("lora") * share)
        for target, (inner, out) in widths.items():
            rank, dropped = experiment.lora.rank, experiment.lora.dropout > 0
            normed = target in COLUMN_PARALLEL  # these modules contain the norm of their input
            before, after = self.tokens / self.token_split, self.tokens
            if not normed:
                before, after = after, before
            read = before * inner * (4 * normed + 5 * dropped)
            forward += Work(
                products=self.product_s(before, rank, inner) + self.product_s(after, out, rank),
                passes=(read + after * out * (4 + 6)) / self.bytes_per_s,
            )
            read = before * inner * (6 + 6 * normed + 5 * dropped)
            backward += Work(
                products=self.product_s(after, rank, out)
                + self.product_s(out, rank, after)
                + self.product_s(before, inner, rank)
                + self.product_s(rank, inner, before),
                passes=(read + after * out * 4) / self.bytes_per_s,
            )
            if experiment.tp > 1:
                crossing = self.collective(self.tensor_gather_s(rank))
                forward, backward = forward + crossing, backward + crossing
        return forward, backward

    def attention(self) -> tuple[Work, Work]:
        """Scores, their softmax and the weighted values: fused, or one after the other."""
        experiment, model = self.experiment, self.model
        if experiment.attention_backend == "unfused":
            return self.unfused_attention()
        length, window = experiment.seq_length, model.window_size
        seen = length / 2
        if window and window < length:
            # every other layer
            seen = (seen + window * (1 - window / (2 * length))) / 2
        scores = self.tokens * seen * model.num_attention_heads / experiment.tp
        # a score's products: forward one over queries and one over values, backward three and two
        keys, values, dropped = model.head_size, model.value_head_size, bool(model.dropout)
        each_ps = (
            self.rates.attention_ps((keys + values) / 2, length, dropped)[0],
            self.rates.attention_ps((3 * keys + 2 * values) / 5, length, dropped)[1],
        )
        forward, backward = (
            Work(attention=scores * ps * 1e-12 / self.constants.attention + KERNEL_S)
            for ps in each_ps
        )
        return forward, backward

    def unfused_attention(self) -> tuple[Work, Work]:
        """All scores pass through memory, those that the mask hides among them."""
        model = self.model
        heads = model.num_attention_heads / self.experiment.tp
        scores = self.tokens * self.experiment.seq_length * heads
        products = 2 * scores * (model.head_size + model.value_head_size) / self.flop_per_s
        return (
            Work(attention=products + scores * SCORE_FORWARD_BYTES / self.bytes_per_s),
            Work(attention=2 * products + scores * SCORE_BACKWARD_BYTES / self.bytes_per_s),
        )

    def queries_and_keys(self) -> tuple[float, float]:
        """Elements of queries and of keys on a rank; means, where results and values differ."""
        model, tokens = self.model, self.tokens / self.experiment.tp
        queries, keys = model.query_size + model.context_size, model.key_size + model.value_size
        return tokens * queries / 2, tokens * keys / 2

    def latent_attention(self) -> tuple[Work, Work]:
        """Norms of what is compressed; positions applied to queries, and to keys written anew.

        Counted in bytes of bf16. The kernels read and write the rotated part of the queries, read
        keys and values as they were rebuilt, and write both (rotary_fwd_q_kernel and
        rotary_fwd_kv_kernel in megatron/core/fusions/fused_mla_yarn_rope_apply.py).
        """
        latent, model, tp = self.model.latent_attention, self.model, self.experiment.tp
        if latent is None:
            return Work(), Work()
        linears = of_layer(model, predictor_kind(self.experiment))
        more = sum(name not in PLAIN_LINEARS for name in linears) - 1  # for linear_qkv
        launches = self.linear_launches * more
        compressed = (
            self.tokens / self.token_split * ((latent.q_lora_rank or 0) + latent.kv_lora_rank)
        )
        heads = self.tokens * model.num_attention_heads / tp
        rebuilt = latent.qk_head_dim + latent.v_head_dim
        turned = 2 * latent.qk_pos_emb_head_dim + rebuilt + model.head_size + model.value_head_size
        moved = 2 * heads * turned
        return (
            Work(passes=(4 * compressed + moved) / self.bytes_per_s, launches=launches.forward),
            Work(passes=(6 * compressed + moved) / self.bytes_per_s, launches=launches.backward),
        )

    def latent_tensor_parallel(self) -> tuple[Work, Work]:
        """Gathers what is compressed before the projections up, and sums the last one's output.

        Without sequence parallelism every rank has it; its gradient is summed.
        """
        latent, experiment = self.model.latent_attention, self.experiment
        if latent is None or experiment.tp == 1:
            return Work(), Work()
        width = (latent.q_lora_rank or 0) + latent.kv_lora_rank
        if not experiment.sequence_parallel:
            message = 2 * self.tokens * width
            summed = self.network.all_reduce_s(message, self.groups.tensor)
            return self.collective(self.all_reduce_s()), self.collective(summed)
        gathered = self.collective(self.tensor_gather_s(width + latent.qk_pos_emb_head_dim))
        again = Work(launches=self.collective_s)
        forward = gathered + self.collective(self.gather_s())
        return forward + again * 2, forward + again * 3

    def projections_up(self) -> Work:
        """Queries, keys and values rebuilt once more from what is compressed."""
        shapes = [
            (self.tokens, linear.outputs / self.experiment.tp, linear.inputs)
            for name, linear in of_layer(self.model, predictor_kind(self.experiment)).items()
            if name in ("linear_q_up_proj", "linear_kv_up_proj")
        ]
        products = sum(self.product_s(*shape, self.experiment.quantised) for shape in shapes)
        launches = self.linear_launches.forward * len(shapes)
        return Work(products=products, launches=launches) + self.latent_attention()[0]

    @property
    def linear_launches(self) -> Launches:
        """Host seconds of a linear layer more than a plain layer has."""
        return self.rates.plain * (LINEAR_SHARE * self.speed.host_s)

    def elementwise(self) -> tuple[Work, Work]:
        """Norms, dropouts with bias and residual, the activation, operations on queries and keys.

        Counted in bytes of bf16; masks have one byte. Without dropout, its gradient costs nothing.
        """
        sides = (self.norm_bytes(), self.norm_bytes(), self.inner_bytes(), self.head_bytes())
        forward, backward = map(sum, zip(*sides, strict=True))
        return Work(passes=forward / self.bytes_per_s), Work(passes=backward / self.bytes_per_s)

    def norm_bytes(self) -> tuple[float, float]:
        """A norm, and a dropout with bias and residual."""
        hidden = self.tokens * self.model.hidden_size / self.token_split
        dropped = bool(self.model.dropout)
        return hidden * (4 + 6 + dropped), hidden * (6 + 6 + 5 * dropped)

    def inner_bytes(self) -> tuple[float, float]:
        """The activation of an MLP or shared expert, and the latter's sum with routed experts."""
        model, forward, backward = self.model, 0.0, 0.0
        if width := model.moe_shared_expert_intermediate_size if model.num_experts else model.ffn:
            inner = self.tokens * width / self.experiment.tp
            forward += inner * (6 if model.gated else 4)
            bias = 2 if model.add_bias_linear else 0
            backward += inner * ((10 if model.gated else 6) + bias)
        if model.moe_shared_expert_intermediate_size:
            # the sum with the routed experts' output, and of both gradients
            hidden = self.tokens * model.hidden_size / self.token_split
            forward, backward = forward + 6 * hidden, backward + 6 * hidden
        return forward, backward

    def head_bytes(self) -> tuple[float, float]:
        """Biases, positions, norms and gates of queries and keys."""
        model, forward, backward = self.model, 0.0, 0.0
        queries, keys = self.queries_and_keys()
        if model.add_bias_linear:
            backward += 2 * (queries + 2 * keys)
        if model.rotates and not model.latent_attention:
            forward, backward = forward + 4 * (queries + keys), backward + 4 * (queries + keys)
        if model.qk_norm == "head" and not model.latent_attention:
            forward, backward = forward + 4 * (queries + keys), backward + 6 * (queries + keys)
        if model.attention_output_gate:
            forward += queries * GATE_FORWARD_BYTES
            backward += queries * GATE_BACKWARD_BYTES
        return forward, backward

    def projection_norms(self) -> tuple[Work, Work]:
        """Queries and keys normalised over all heads; tensor parallel ranks sum their squares."""
        tp, model = self.experiment.tp, self.model
        if model.qk_norm != "projection":
            return Work(), Work()
        byte_s = self.tokens * (model.query_size + model.key_size) / tp / self.bytes_per_s
        # an operation's host time is that of both its passes, two thirds of it backward
        launches = 2 * PROJECTION_NORM_OPERATIONS * self.operation_s / 3
        sums = self.collective(MESSAGE_S) * 2 if tp > 1 else Work()
        return (
            Work(passes=byte_s * PROJECTION_NORM_FORWARD_BYTES, launches=launches) + sums,
            Work(passes=byte_s * PROJECTION_NORM_BACKWARD_BYTES, launches=2 * launches) + sums,
        )

    def experts(self) -> tuple[Work, Work]:
        """Grouped products, permutation and weighting of tokens.

        Assumes that routers spread tokens evenly.
        """
        model, constants = self.model, self.constants
        ep, etp, hidden = self.experiment.ep, self.experiment.etp, model.hidden_size
        if not model.num_experts:
            return Work(), Work()
        rows, byte_s = self.routed_rows() + padded_rows(self.experiment), self.bytes_per_s
        width, matrices = model.moe_ffn / etp, model.fc1_matrices + 1
        held = model.num_experts / ep
        weights = held * width * hidden * matrices
        moved = 2 * (rows * (2 * hidden + matrices * width) + weights) / byte_s
        flops = 2 * rows * width * hidden * matrices
        each = 2 * rows / held * width * model.fc1_matrices * hidden
        # no machine file has grouped products in fp8 or fp4: assumed as fast as in bf16
        flop_per_s = self.rates.grouped_flop_per_s(each) * self.constants.products
        products = max(flops / flop_per_s, moved) + 2 * held * KERNEL_S
        permuted = ROUTED_PASSES * rows / byte_s
        launches = self.launched(self.rates.experts(1) - self.fused_router())
        searched_s = 0.0
        if self.experiment.grouped_gemm == "streams":
            searched_s = constants.expert_ms * held / 1e3
        gradients = weights * self.weight_gradient_bytes / byte_s
        forward = Work(
            products=products,
            passes=permuted * (12 * hidden + 6 * width),
        )
        backward = Work(
            products=2 * products,
            passes=permuted * (16 * hidden + 10 * width) + gradients,
        )
        hooked_s = self.own_weights() * WEIGHT_OPERATIONS * self.speed.operation_us / 1e6
        return (
            forward + launches[0] + Work(launches=searched_s / 3),
            backward + launches[1] + Work(launches=2 * searched_s / 3 + hooked_s),
        )

    def own_weights(self) -> int:
        """Weights and biases of a layer's experts on a rank that are parameters of their own.

        None with one product for each expert: the fitted ``expert_ms`` holds what they cost there.
        """
        model = self.model
        counted = self.experiment.grouped_gemm in ("cutlass", "cublas") and not self.experiment.lora
        if not model.num_experts or not counted:
            return 0
        return 2 * (1 + model.add_bias_linear) * model.num_experts // self.experiment.ep

    def fused_router(self) -> Launches:
        """What the router's fused kernels save the host, a third of it forward."""
        if not self.experiment.router_fusion:
            return Launches()
        operations = FUSED_TOPK_OPERATIONS
        if self.model.moe_aux_loss_coeff is not None:
            operations += FUSED_SCORE_OPERATIONS
        each = operations * self.speed.operation_us / 3e3
        return Launches(each, 2 * each)

    def routed_tokens(self, computing_s: float) -> Work:
        """Tokens to their experts and back, in either pass.

        Args:
            computing_s: of a layer's pass, behind which another micro-batch's tokens are sent
                (--overlap-moe-expert-parallel-comm).
        """
        seconds, sharing, launches = self.tokens_sent()
        if self.experiment.ep_overlap:
            seconds = larger(sharing, seconds - computing_s / 2)
        elif self.experiment.shared_expert_overlap:
            width = self.model.moe_shared_expert_intermediate_size or 0
            seconds = larger(sharing, seconds - self.mlp_forward(width).gpu / 2)
        return Work(exchange=seconds, launches=launches) * 2

    def tokens_sent(self) -> tuple[float, float, float]:
        """Seconds in which tokens are sent to their experts or back, those that computing does not
        hide in any case, and those of launching it.

        All-to-all sends each copy of a token; ``flex`` (DeepEP, HybridEP) sends one to each node
        that has any of its experts, which passes it on; all-gather sends every token to all. Under
        expert tensor parallelism each group gathers its tokens, whose numbers differ, by
        broadcasts.
        """
        experiment, network, group = self.experiment, self.network, self.groups.experts
        if experiment.ep * experiment.etp == 1:
            return 0.0, 0.0, 0.0
        hidden = 2 * self.model.hidden_size
        copies = hidden * self.routed_rows() / experiment.etp
        tokens = copies / self.model.moe_router_topk
        match experiment.moe_dispatcher:
            case "alltoall":
                seconds = network.all_to_all_s(copies, group)
            case "flex":
                reached = network.nodes_reached(self.model.moe_router_topk, group)
                seconds = network.all_to_all_s(copies, group, tokens * reached)
            case "allgather":
                seconds = network.gather_s(tokens * experiment.ep, group)
        seconds += network.gather_s(copies * experiment.etp, self.groups.split_experts)
        sharing = self.constants.exposed * network.within_node_s(copies, group)
        return seconds, sharing, self.collective_s

    def expert_shapes(self) -> list[tuple[float, float, float]]:
        """Rows, columns and inner size of experts' two products, all of a rank's as one."""
        model, rows = self.model, self.routed_rows()
        width, hidden = model.moe_ffn / self.experiment.etp, model.hidden_size
        return [(rows, width * model.fc1_matrices, hidden), (rows, hidden, width)]

    def routed_rows(self) -> float:
        """Rows for the experts of a rank; sequence parallelism splits tokens before the router."""
        kept = min(self.experiment.moe_capacity or 1.0, 1.0)
        copies = self.model.moe_router_topk * kept
        return self.tokens / self.token_split * copies * self.experiment.etp

    def tensor_parallel(self) -> tuple[Work, Work]:
        """Sums after attention and MLP or shared expert, and as many backward.

        Routed experts exchange tokens instead; latent attention gathers less.
        """
        model = self.model
        sums = (model.latent_attention is None) + bool(
            not model.num_experts or model.moe_shared_expert_intermediate_size
        )
        forward, backward = self.tensor_parallel_sum()
        return forward * sums, backward * sums

    def tensor_parallel_sum(self) -> tuple[Work, Work]:
        """The sum of what the ranks of tensor parallelism have computed, and one backward."""
        if self.experiment.tp == 1:
            return Work(), Work()
        if self.experiment.sequence_parallel:
            forward = self.collective(self.gather_s(), self.exposed_by_pieces) * 2
        else:
            forward = self.collective(self.all_reduce_s())
        return forward, self.input_gradient()

    def input_gradient(self) -> Work:
        """Sums up the gradient of a split product's input while its weights' gradient is computed.

        Sequence parallelism scatters the sum, and gathers gradient and input.
        """
        # FSDP wants several queues, so that nothing orders the exchange before the product
        beside = 1.0 if self.experiment.fully_sharded else self.constants.exposed
        exposed = min(beside, self.exposed_by_pieces)
        if not self.experiment.sequence_parallel:
            return self.collective(self.all_reduce_s(), exposed)
        gathered_input = Work(launches=self.collective_s)
        return self.collective(self.gather_s(), exposed) * 2 + gathered_input

    @property
    def exposed_by_pieces(self) -> float:
        """Share of an exchange that a product of the same tokens, piece by piece, does not hide.

        TE's userbuffers cut both into a piece a rank; no product runs beside the first one.
        """
        return 1 / self.experiment.tp if self.experiment.tp_overlap else 1.0

    def collective(self, seconds: float, exposed: float = 1.0) -> Work:
        """A collective that takes ``seconds``, of which the share ``exposed`` is not hidden."""
        return Work(exchange=seconds * exposed, launches=self.collective_s)

    @property
    def collective_s(self) -> float:
        """Host time of a collective."""
        return self.constants.collective_ms * self.speed.host_s

    def gather_s(self) -> float:
        """Seconds to all-gather or reduce-scatter a hidden state over tensor parallel ranks."""
        return self.tensor_gather_s(self.model.hidden_size)

    def tensor_gather_s(self, width: float) -> float:
        """The same for ``width`` elements of each token."""
        return self.network.gather_s(2 * self.tokens * width, self.groups.tensor)

    def all_reduce_s(self) -> float:
        """Seconds to all-reduce a hidden state over tensor parallel ranks."""
        message = 2 * self.tokens * self.model.hidden_size
        return self.network.all_reduce_s(message, self.groups.tensor)

    def context_parallel(self) -> tuple[Work, Work]:
        """What context parallel ranks exchange, and how they merge their parts of the attention.

        By a2a+p2p both levels do, one after the other; their launches are added up.
        """
        heads, keys = self.experiment.cp_levels
        parts = [self.exchanged_heads] if heads > 1 else []
        if keys > 1:
            gathers = self.experiment.cp_comm_type == "all_gather"
            parts.append(self.gathered_keys if gathers else self.ring)
        return added(Work(), Work(), parts)

    def ring(self) -> tuple[Work, Work]:
        """Sends keys and values on, backward their gradients too, while attention computes on those
        of the turn before, and merges the results of all turns."""
        byte_s, group = self.bytes_per_s, self.groups.exchanging_keys
        queries, keys = self.queries_and_keys()
        turns = group.ranks - 1
        launches = self.context_launches_s * (1 + group.ranks * RING_SHARE)
        merged = turns * (12 * queries / byte_s + KERNEL_S)
        summed = turns * (6 * (queries + 2 * keys) / byte_s + KERNEL_S)
        sent_s = self.network.turn_s(4 * keys, group)
        forward, backward = (work.attention / group.ranks for work in self.attention())
        return (
            Work(passes=merged, launches=launches)
            + Work(exchange=turns * max(0.0, sent_s - forward)),
            Work(passes=summed, launches=launches)
            + Work(exchange=turns * max(0.0, 2 * sent_s - backward)),
        )

    def gathered_keys(self) -> tuple[Work, Work]:
        """Keys and values of all ranks, before attention; backward their gradients too."""
        group, (_, keys) = self.groups.exchanging_keys, self.queries_and_keys()
        gathered = self.network.gather_s(4 * keys * group.ranks, group)
        return (
            Work(exchange=gathered, launches=self.context_launches_s),
            Work(exchange=2 * gathered, launches=self.context_launches_s),
        )

    def exchanged_heads(self) -> tuple[Work, Work]:
        """Queries, keys, values and results, all heads of few tokens for few heads of more tokens:
        as many elements on a rank as before."""
        exchanged = 4 * sum(self.queries_and_keys())
        group = self.groups.exchanging_heads
        work = Work(
            passes=2 * exchanged / self.bytes_per_s,
            launches=self.context_launches_s,
            exchange=self.network.all_to_all_s(exchanged, group) + 3 * MESSAGE_S,
        )
        return work, work

    @property
    def context_launches_s(self) -> float:
        """Host time of context parallelism's operations in a layer, without a ring's turns."""
        return self.constants.context_ms * self.speed.host_s

    def product_s(
        self, rows: float, columns: float, inner: float, quantised: bool = False
    ) -> float:
        """Seconds of a matrix product, [rows, inner] x [inner, columns].

        Bound by arithmetic or by memory, whichever takes longer.
        """
        flop_per_s, each = self.flop_per_s, 2.0
        if quantised:
            flop_per_s = self.quantised_flop_per_s
            each = NVFP4_BYTES if self.experiment.precision == "fp4" else 1.0
        arithmetic = 2 * rows * columns * inner / flop_per_s
        moved = 2 * rows * columns + each * (columns * inner + rows * inner)
        return max(arithmetic, moved / self.bytes_per_s) + KERNEL_S


def added(
    forward: Work, backward: Work, parts: Iterable[Callable[[], tuple[Work, Work]]]
) -> tuple[Work, Work]:
    """Both passes with what ``parts`` add to them."""
    for part in parts:
        more_forward, more_backward = part()
        forward, backward = forward + more_forward, backward + more_backward
    return forward, backward
