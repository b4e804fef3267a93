"""The first steps of a run, replayed as the allocations that they make on one rank.

What PyTorch reserves beyond its tensors depends on their order. The first step leaves segments of
its activations in the cache; the optimizer's moments, made after it, take parts of them; the second
step finds the holes too small and reserves more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.experiment.experiment import Experiment
from harness.experiment.pipeline import chunk_layers, is_even, stage_layers
from harness.predict.activations import (
    Operation,
    attention_operations,
    element_bytes,
    hidden_bytes,
    logits_on,
    mask_bytes,
    mlp_operations,
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


def layers_in_flight(experiment: Experiment, stage: int) -> tuple[int, ...]:
    """Layers of each forward pass whose activations a rank of ``stage`` keeps when they are most.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.
    """
    layers, micro_batches = chunk_layers(experiment), experiment.num_microbatches
    if is_even(experiment):
        warm_up = warm_up_passes(stage, experiment.pp, experiment.vpp)
        return layers[0][:1] * min(warm_up + 1, micro_batches * experiment.vpp)
    return tuple(layers[stage][chunk] for chunk in most_in_flight(stage, micro_batches, layers))


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

    layers: list[Saved]
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
        self.layers = stage_layers(experiment)[stage]
        self.in_flight = layers_in_flight(experiment, stage)
        self.operations = attention_operations(experiment) + mlp_operations(experiment)
        self.moments: list[float] = []
        self.fp8_copies: list[int] = []
        if experiment.precision == "fp8":
            matrices = [size for size in _layer_parameters(experiment) if size > 2**20]
            self.fp8_copies = [size for size in matrices for _ in ("by rows", "by columns")]
        self.without_fp8_copies = self.layers if self.fp8_copies else 0

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
        parameters += _layer_parameters(experiment) * self.layers
        if self.last and (experiment.model.untie_embeddings or not self.first):
            parameters.append(self.embedding)
        return parameters

    def _adapters(self) -> list[int]:
        """Elements of each of LoRA's factors."""
        rank = self.experiment.lora.rank
        widths = adapter_widths(self.experiment).values()
        layer = [rank * width for both in widths for width in both]
        return layer * self.layers

    def _forward(self, layers_of_chunk: int, *, captured: bool) -> _Pass:
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
            copies = [self.hidden] * COPIES_OF_GRAPHS * layers_of_chunk
            others += self.allocator.allocate_all(copies)
            free(*embeddings)
            layers = []
        else:
            layers, passing = self._layers_forward(layers_of_chunk, passing, embeddings)
        output = take(self.hidden)
        free(passing)
        return _Pass(layers, output, others)

    def _layers_forward(
        self, number: int, passing: Block | None, embeddings: Iterable[Block | None]
    ) -> tuple[list[Saved], Block | None]:
        """``number`` layers on one micro-batch; returns what they save, and an output."""
        layers = []
        for _ in range(number):
            if self.without_fp8_copies:
                self.without_fp8_copies -= 1
                self.allocator.allocate_all(self.fp8_copies)
            if self.experiment.recompute == "full":
                kept = self.allocator.allocate(self.hidden)
                saved, passing = self._layer_forward(passing, embeddings)
                self.allocator.free(*(block for _, blocks in saved for block in blocks))
                saved = [(Operation((self.hidden,), 0), [kept])]
            else:
                saved, passing = self._layer_forward(passing, embeddings)
            layers.append(saved)
            embeddings = ()
        return layers, passing

    def _layer_forward(
        self, passing: Block | None, embeddings: Iterable[Block | None] = ()
    ) -> tuple[Saved, Block | None]:
        saved = []
        for operation in self.operations:
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
        normed, logits = take(self.hidden), logits_on(experiment)
        computed, softmax = take(size * logits), take(4 * logits)
        if experiment.cross_entropy_fusion:
            written = take(4 * logits)
            free(softmax)
            softmax = written
        free(computed)
        of_logits = take(size * logits)
        free(softmax)
        gradient = take(self.hidden)
        of_weight = None if experiment.lora else take(size * self.embedding)
        free(of_logits, normed)
        if self.first and not experiment.model.untie_embeddings:
            return gradient, of_weight
        free(of_weight)
        return gradient, None

    def _layers_backward(
        self, layers: list[Saved], residual: Block | None, gradient: Block | None
    ) -> Block | None:
        """All layers; returns the gradient of their input."""
        for saved in reversed(layers):
            kept: list[Block | None] = []
            if self.experiment.recompute == "full":
                kept = saved[0][1]
                saved, passing = self._layer_forward(None)
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


def _layer_parameters(experiment: Experiment) -> list[int]:
    """Elements of each parameter of a layer."""
    model, hidden, tp = experiment.model, experiment.model.hidden_size, experiment.tp
    bias = model.add_bias_linear
    norm = [hidden] * (2 if model.normalization == "LayerNorm" else 1)
    outputs, inputs = model.qkv_size // tp, model.query_size // tp
    attention = [hidden * inputs, *([hidden] if bias else [])]
    attention += [hidden * outputs, *([outputs] if bias else []), *norm]
    width = (model.moe_ffn // experiment.etp) if model.num_experts else model.ffn // tp
    before = width * model.fc1_matrices
    mlp = [hidden * before, hidden * width, *([before, hidden] if bias else [])]
    if model.num_experts:
        mlp = mlp * (model.num_experts // experiment.ep) + [hidden * model.num_experts]
    return [*attention, *norm, *mlp]


def _first_shard(parameters: Sequence[int], replicas: int) -> list[int]:
    """What the first of ``replicas`` ranks has of each parameter, all of them in one buffer."""
    left = math.ceil(sum(parameters) / replicas)
    shard = []
    for size in parameters:
        shard.append(min(size, left))
        left -= shard[-1]
    return [size for size in shard if size]
