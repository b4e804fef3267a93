"""The first steps of a run, replayed as the allocations that they make on one rank.

What PyTorch reserves beyond its tensors depends on their order. The first step leaves segments of
its activations in the cache; the optimizer's moments, made after it, take parts of them; the second
step finds the holes too small and reserves more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.experiment import linear_layers
from harness.experiment.experiment import Experiment
from harness.experiment.linear_layers import Linear
from harness.predict import stages
from harness.predict.activations import (
    Operation,
    element_bytes,
    hidden_bytes,
    layer_operations,
    logits_on,
    mask_bytes,
)
from harness.predict.allocator import Allocator, Block
from harness.predict.flops import adapter_widths, padded_vocab_size, state_of_parameter
from harness.predict.timeline import most_in_flight, warm_up_passes

WORKSPACE_BYTES = 2**25
"""cuBLAS's on Hopper: PyTorch's, and get_cublas_workspace_size_bytes in
transformer_engine/pytorch/cpp_extensions."""
STEPS = 3
"""After them hardly anything more is reserved."""
COPIES_OF_GRAPHS = 3
"""Hidden states a layer that a step allocates between the CUDA graphs of its layers: what six runs
on H200s reserved."""

Saved = list[tuple[Operation, list[Block | None]]]


@dataclass(frozen=True)
class Footprint:
    """Bytes on one rank."""

    allocated: float
    """The most that is allocated at once, in whole blocks."""
    rounding: float
    """The part of it that no tensor asked for."""
    reserved: float
    """The most that PyTorch takes from the GPU, CUDA graphs' pool included."""


def replay(experiment: Experiment, stage: int) -> Footprint:
    """What a rank of pipeline stage ``stage`` takes in the first steps."""
    key = (experiment.model_dump_json(), stage)
    if key not in _REPLAYED:
        _REPLAYED[key] = _replay(experiment, stage)
    return _REPLAYED[key]


_REPLAYED: dict[tuple[str, int], Footprint] = {}
"""Pages ask for the same experiments again and again."""


def _replay(experiment: Experiment, stage: int) -> Footprint:
    rank = _Rank(experiment, stage)
    rank.build()
    rank.step()
    graphs = captures_layers(experiment)
    in_graphs = rank.capture() if graphs else 0
    rank.make_moments()
    for _ in range(STEPS - 1):
        rank.step(captured=graphs)
    allocator = rank.allocator
    return Footprint(
        allocated=allocator.most_allocated,
        rounding=allocator.most_allocated - allocator.requested_at_most,
        reserved=max(allocator.most_reserved, allocator.reserved + in_graphs),
    )


def layers_in_flight(experiment: Experiment, stage: int) -> tuple[stages.Layers, ...]:
    """Layers of each forward pass whose activations a rank of ``stage`` keeps when they are most.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.
    """
    held, micro_batches = stages.all_chunks(experiment), experiment.num_microbatches
    if stages.alike(experiment):
        warm_up = warm_up_passes(stage, experiment.pp, experiment.vpp)
        return held[0][:1] * min(warm_up + 1, micro_batches * experiment.vpp)
    kept = {kind: _kept_bytes(experiment, kind) for kind in {*_kinds(held)}}
    sizes = [[sum(kept[kind] for kind in chunk.kinds) for chunk in chunks] for chunks in held]
    return tuple(held[stage][chunk] for chunk in most_in_flight(stage, micro_batches, sizes))


def _kinds(held: Iterable[Iterable[stages.Layers]]) -> Iterable[str]:
    return (kind for chunks in held for chunk in chunks for kind in chunk.kinds)


def _kept_bytes(experiment: Experiment, kind: str) -> float:
    """Bytes that a layer keeps of one micro-batch."""
    if experiment.recompute == "full":
        return hidden_bytes(experiment)
    return sum(sum(operation.saves) for operation in layer_operations(experiment, kind))


def captures_layers(experiment: Experiment) -> bool:
    """Whether CUDA graphs hold whole layers; with experts they hold attention and router only."""
    return experiment.cuda_graphs and not experiment.model.num_experts


def moments_share(experiment: Experiment) -> float:
    """The moments' share of the optimizer's state; the rest are the weights' fp32 copies."""
    optimizer = state_of_parameter(experiment, 1).optimizer
    return 1 - _copy_bytes(experiment) / optimizer


def _copy_bytes(experiment: Experiment) -> int:
    """Bytes of a parameter's fp32 copy, which state_of_parameter counts with the moments."""
    if experiment.precision == "fp32":
        return 0
    only_remainder = experiment.optimizer_state == "bf16" and experiment.fp8_recipe in (
        None,
        "delayed",
    )
    return 2 if only_remainder else 4


@dataclass
class _Pass:
    """What a micro-batch's forward pass leaves for its backward pass."""

    layers: list[tuple[str, Saved]]
    """The kind of each layer, and what it saved."""
    output: Block | None
    """The last layer's."""
    others: list[Block | None]


class _Rank:
    """A rank's allocator, and the tensors that live from step to step."""

    def __init__(self, experiment: Experiment, stage: int) -> None:
        self.allocator = Allocator()
        self.experiment = experiment
        self.first, self.last = stage == 0, stage == experiment.pp - 1
        self.hidden = hidden_bytes(experiment)
        vocabulary = padded_vocab_size(experiment.model.vocab_size, experiment.tp)
        self.embedding = experiment.model.hidden_size * vocabulary // experiment.tp
        self.layers = stages.on_stage(experiment, stage)
        self.in_flight = layers_in_flight(experiment, stage)
        kinds = set(self.layers.kinds)
        self.operations = {kind: layer_operations(experiment, kind) for kind in kinds}
        self.moments: list[float] = []
        self.without_fp8_copies = dict.fromkeys(kinds, 0)
        if experiment.precision == "fp8":
            self.without_fp8_copies = dict(zip(self.layers._fields, self.layers, strict=True))

    def build(self) -> None:
        """Allocate weights, gradients, fp32 copies and workspaces."""
        experiment, take = self.experiment, self.allocator.allocate_all
        parameters, replicas = self._parameters(), experiment.dp * experiment.cp
        state = state_of_parameter(experiment, replicas)
        weights = take(element_bytes(experiment) * size for size in parameters)
        trained = self._adapters() if experiment.lora else parameters
        sharded = experiment.sharding != "no_shard"
        if experiment.lora:
            take(element_bytes(experiment) * size for size in trained)
        elif sharded:
            # the distributed optimizer and both kinds of FSDP move weights to a buffer
            take([state.weights * sum(parameters)])
            self.allocator.free(*weights)
        take([state.gradients * sum(trained)])
        self._make_optimizer(_first_shard(trained, replicas if sharded else 1))
        # PyTorch's forward and backward thread, Transformer Engine; with experts, four streams too
        take([WORKSPACE_BYTES] * (7 if experiment.model.num_experts else 3))

    def _make_optimizer(self, parameters: Sequence[float]) -> None:
        copy = _copy_bytes(self.experiment)
        self.allocator.allocate_all(copy * size for size in parameters)
        moment = (state_of_parameter(self.experiment, 1).optimizer - copy) / 2
        self.moments = [moment * size for size in parameters for _ in ("first", "second")]

    def make_moments(self) -> None:
        """Allocate the optimizer's moments, as its first step does."""
        self.allocator.allocate_all(self.moments)

    def step(self, *, captured: bool = False) -> None:
        """One step, with no more micro-batches than are in flight at most.

        ``captured``: layers run from CUDA graphs, which have their own pool.
        """
        passes = [self._forward(layers, captured=captured) for layers in self.in_flight]
        for done in passes:
            self._backward(done)

    def capture(self) -> float:
        """Bytes that graphs of all layers reserve; empties the cache, as each capture does."""
        self.allocator.release_cache()
        eager, self.allocator = self.allocator, Allocator()
        in_flight = [self._layers_forward(layers, None, ()) for layers in self.in_flight]
        for layers, passing in in_flight:
            self.allocator.free(passing)
            self._layers_backward(layers, self.allocator.allocate(self.hidden), None)
        pool, self.allocator = self.allocator, eager
        return pool.reserved

    def _parameters(self) -> list[int]:
        """Elements of each parameter, in the order of construction."""
        experiment = self.experiment
        parameters = [self.embedding] if self.first else []
        if self.first and experiment.model.position_embedding == "learned_absolute":
            positions = experiment.positions or experiment.seq_length
            parameters.append(experiment.model.hidden_size * positions)
        for kind in self.layers.kinds:
            parameters += _layer_parameters(experiment, kind)
        if self.last and (experiment.model.untie_embeddings or not self.first):
            parameters.append(self.embedding)
        if self.layers.predictors and not self.first and experiment.model.untie_embeddings:
            parameters.append(self.embedding)
        return parameters

    def _adapters(self) -> list[int]:
        """Elements of each of LoRA's factors."""
        rank = self.experiment.lora.rank
        widths = adapter_widths(self.experiment).values()
        layer = [rank * width for both in widths for width in both]
        return layer * self.layers.total

    def _forward(self, layers_of_chunk: stages.Layers, *, captured: bool) -> _Pass:
        take, free = self.allocator.allocate, self.allocator.free
        experiment = self.experiment
        others = [take(experiment.micro_batch_size * experiment.seq_length**2 / experiment.cp)]
        embeddings: list[Block | None] = []
        if self.first and experiment.model.position_embedding == "learned_absolute":
            # words and positions outlive their sum
            # (megatron/core/models/common/embeddings/language_model_embedding.py)
            embeddings = self.allocator.allocate_all([self.hidden] * 2)
        total = take(self.hidden)
        passing = take(self.hidden)  # transposed
        free(total)
        if captured:
            copies = [self.hidden] * COPIES_OF_GRAPHS * layers_of_chunk.total
            others += self.allocator.allocate_all(copies)
            free(*embeddings)
            layers = []
        else:
            layers, passing = self._layers_forward(layers_of_chunk, passing, embeddings)
        output = take(self.hidden)
        free(passing)
        return _Pass(layers, output, others)

    def _layers_forward(
        self, held: stages.Layers, passing: Block | None, embeddings: Iterable[Block | None]
    ) -> tuple[list[tuple[str, Saved]], Block | None]:
        """The layers ``held`` on one micro-batch; returns what they save, and an output."""
        layers = []
        for kind in held.kinds:
            if self.without_fp8_copies[kind]:
                self.without_fp8_copies[kind] -= 1
                self.allocator.allocate_all(self._fp8_copies(kind))
            operations = self.operations[kind]
            if self.experiment.recompute == "full":
                kept = self.allocator.allocate(self.hidden)
                saved, passing = self._layer_forward(operations, passing, embeddings)
                self.allocator.free(*(block for _, blocks in saved for block in blocks))
                saved = [(Operation((self.hidden,), 0), [kept])]
            else:
                saved, passing = self._layer_forward(operations, passing, embeddings)
            layers.append((kind, saved))
            embeddings = ()
        return layers, passing

    def _fp8_copies(self, kind: str) -> list[int]:
        """Elements of a layer's quantised weights."""
        matrices = (size for size in _layer_parameters(self.experiment, kind) if size > 2**20)
        return [size for size in matrices for _ in ("by rows", "by columns")]

    def _layer_forward(
        self,
        operations: Iterable[Operation],
        passing: Block | None,
        embeddings: Iterable[Block | None] = (),
    ) -> tuple[Saved, Block | None]:
        saved = []
        for operation in operations:
            saved.append((operation, self.allocator.allocate_all(operation.saves)))
            self.allocator.free(passing, *embeddings)
            embeddings = ()
            passing = self.allocator.allocate(operation.passing)
        return saved, passing

    def _backward(self, done: _Pass) -> None:
        take, free = self.allocator.allocate, self.allocator.free
        tied = None
        if self.last:
            gradient, tied = self._loss()
        else:
            gradient = take(self.hidden)  # received
        residual = take(self.hidden)
        free(gradient, done.output)
        residual = self._layers_backward(done.layers, residual, self._masked())
        if self.first and not self.experiment.lora:
            free(take(element_bytes(self.experiment) * self.embedding))
        free(residual, tied, *done.others)

    def _loss(self) -> tuple[Block | None, Block | None]:
        """Logits, loss and the output layer's gradients.

        Returns the gradient of its input, and the embedding's where both share a weight: autograd
        keeps it until it has the embedding's own.
        """
        take, free = self.allocator.allocate, self.allocator.free
        experiment, size = self.experiment, element_bytes(self.experiment)
        logits = logits_on(experiment)
        later = [self._softmax(logits) for _ in range(experiment.model.predictors)]
        normed = take(self.hidden)
        of_logits, softmax = None, self._softmax(logits)
        for kept in (softmax, *later):
            free(of_logits)
            of_logits = take(size * logits)
            free(kept)
        gradient = take(self.hidden)
        of_weight = None if experiment.lora else take(size * self.embedding)
        free(of_logits, normed)
        if self.first and not experiment.model.untie_embeddings:
            return gradient, of_weight
        free(of_weight)
        return gradient, None

    def _softmax(self, logits: float) -> Block | None:
        """Computes logits and loss; returns the softmax in fp32, which stays."""
        take, free = self.allocator.allocate, self.allocator.free
        computed, softmax = take(element_bytes(self.experiment) * logits), take(4 * logits)
        if self.experiment.cross_entropy_fusion:
            written = take(4 * logits)
            free(softmax)
            softmax = written
        free(computed)
        return softmax

    def _layers_backward(
        self,
        layers: list[tuple[str, Saved]],
        residual: Block | None,
        gradient: Block | None,
    ) -> Block | None:
        """All layers; returns the gradient of their input."""
        for kind, saved in reversed(layers):
            kept: list[Block | None] = []
            if self.experiment.recompute == "full":
                kept = saved[0][1]
                saved, passing = self._layer_forward(self.operations[kind], None)
                self.allocator.free(passing)
            gradient = self._layer_backward(saved, residual, gradient)
            self.allocator.free(*kept)
        self.allocator.free(gradient)
        return residual

    def _layer_backward(
        self, saved: Saved, residual: Block | None, gradient: Block | None
    ) -> Block | None:
        """One layer; its gradients are added to ``residual`` in place."""
        take, free = self.allocator.allocate, self.allocator.free
        for operation, blocks in reversed(saved):
            of_input, of_weight = take(operation.gradient), take(operation.weight_gradient)
            if operation.adds_residual:
                free(gradient, of_input, *blocks)
                gradient = self._masked()
                continue
            free(of_weight)
            if of_input:
                free(gradient)
                gradient = of_input
            free(*blocks)
        return gradient

    def _masked(self) -> Block | None:
        """The gradient that dropout writes going backward; without dropout it is the residual's."""
        return self.allocator.allocate(self.hidden) if mask_bytes(self.experiment) else None


def _layer_parameters(experiment: Experiment, kind: str) -> list[int]:
    """Elements of each parameter of a layer: ``dense``, ``experts``, or in ``predictors``."""
    model, hidden = experiment.model, experiment.model.hidden_size
    norm = [hidden] * (2 if model.normalization == "LayerNorm" else 1)
    more = []
    if kind == "predictors":
        more = [*norm * 3, linear_layers.of_predictor(model).weights // experiment.tp]
        kind = stages.predictor_kind(experiment)
    attention = linear_layers.of_attention(model)
    proj = attention.pop("linear_proj")
    parameters = _elements(proj, experiment.tp)
    for linear in attention.values():
        parameters += _elements(linear, experiment.tp)
    parameters += norm * 2
    if kind == "dense":
        mlp = [
            _elements(one, experiment.tp) for one in linear_layers.of_mlp(model, model.ffn).values()
        ]
    else:
        expert = linear_layers.of_mlp(model, model.moe_ffn).values()
        mlp = [_elements(one, experiment.etp) for one in expert] * (
            model.num_experts // experiment.ep
        )
        mlp += [
            _elements(one, experiment.tp) for one in linear_layers.of_shared_expert(model).values()
        ]
        mlp.append([hidden * model.num_experts])
    return [*more, *parameters, *(size for sizes in mlp for size in sizes)]


def _elements(linear: Linear, tp: int) -> list[int]:
    """Elements of a linear layer's weight, and of its bias if it has one, on a rank."""
    outputs = linear.outputs // (tp if linear.split == "outputs" else 1)
    inputs = linear.inputs // (tp if linear.split == "inputs" else 1)
    return [outputs * inputs, *([outputs] if linear.bias else [])]


def _first_shard(parameters: Sequence[int], replicas: int) -> list[int]:
    """What the first of ``replicas`` ranks has of each parameter, all of them in one buffer."""
    left = math.ceil(sum(parameters) / replicas)
    shard = []
    for size in parameters:
        shard.append(min(size, left))
        left -= shard[-1]
    return [size for size in shard if size]
