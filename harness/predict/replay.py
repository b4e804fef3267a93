"""The first steps of a run, replayed as the allocations that they make on one rank.

What PyTorch reserves beyond its tensors depends on their order. The first step leaves segments of
its activations in the cache; the optimizer's moments, made after it, take parts of them; the second
step finds the holes too small and reserves more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from harness.experiment import linear_layers
from harness.experiment.experiment import Experiment
from harness.experiment.model import Model
from harness.experiment.unlisted import row_of
from harness.predict import stages
from harness.predict.activations import (
    graphed_operations,
    kept_bytes,
    layer_operations,
    logits_on,
    loss_kind,
    prepared_bytes,
)
from harness.predict.allocator import Allocator, Block
from harness.predict.flops import (
    adapter_widths,
    dummy_gradients,
    mamba_vectors,
    padded_vocab_size,
    state_of_parameter,
    state_on,
)
from harness.predict.operations import (
    NVFP4_BYTES,
    element_bytes,
    gathered_bytes,
    hidden_bytes,
    mask_bytes,
    regained,
    weight_gradient_bytes,
)
from harness.predict.timeline import most_in_flight, warm_up_passes

WORKSPACE_BYTES = 2**25
"""cuBLAS's on Hopper: PyTorch's, and get_cublas_workspace_size_bytes in
transformer_engine/pytorch/cpp_extensions."""
STEPS = 3
"""After them hardly anything more is reserved."""
STATIC_INPUTS = 2
"""Hidden states that each of Transformer Engine's graphs keeps outside of their pool
(_get_sample_arguments in megatron/core/transformer/cuda_graphs.py)."""


@dataclass(eq=False)
class _Layer:
    """What a layer's forward pass leaves."""

    kind: str
    blocks: list[list[Block | None]]
    """Of each operation, what it keeps; with full recomputation only the layer's input."""
    recomputed: bool = False


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
    in_graphs = 0.0
    if experiment.graphs_by == "local":  # captured in the first step
        in_graphs = rank.capture()
        rank.change_stream()
        rank.make_moments()
    else:
        rank.make_moments()
        if experiment.graphs_by:
            rank.step()
            in_graphs = rank.capture()
            rank.keep_static_inputs()
    for _ in range(STEPS - 1):
        rank.step()
    allocator = rank.allocator
    return Footprint(
        allocated=allocator.most_allocated,
        rounding=allocator.most_allocated - allocator.requested_at_most,
        reserved=max(allocator.most_reserved, allocator.reserved + in_graphs),
    )


def layers_in_flight(experiment: Experiment, stage: int) -> tuple[stages.Layers, ...]:
    """The layers of each forward pass that a rank of ``stage`` keeps when its tensors are most.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), section 2.2.
    """
    chunks, micro_batches = stages.chunks(experiment, stage), experiment.num_microbatches
    if len({*chunks}) == 1:
        warm_up = warm_up_passes(stage, experiment.pp, experiment.vpp)
        return chunks[:1] * min(warm_up + 1, micro_batches * experiment.vpp)
    kept = _kept_of_kinds(experiment.model, experiment.recompute, experiment.recompute_modules)
    sizes = tuple(sum(kept[kind] for kind in chunk.kinds) for chunk in chunks)
    fullest = most_in_flight(stage, experiment.pp, micro_batches, sizes)
    return tuple(chunks[chunk] for chunk in fullest)


@lru_cache(maxsize=256)
def _kept_of_kinds(model: Model, recompute: str, modules: tuple[str, ...]) -> dict[str, float]:
    """Bytes that a layer of each kind keeps on one GPU; layouts hardly change their ratios."""
    one = row_of(model).model_copy(update={"recompute": recompute, "recompute_modules": modules})
    numbers = stages.of_model(one)._asdict()
    return {kind: kept_bytes(one, kind) for kind, number in numbers.items() if number}


def workspaces(experiment: Experiment) -> list[int]:
    """Bytes of cuBLAS's workspaces: of PyTorch's forward and backward thread, and Transformer
    Engine's; with experts, of its four streams, too."""
    return [WORKSPACE_BYTES] * (7 if experiment.model.num_experts else 3)


def moments_share(experiment: Experiment) -> float:
    """The moments' share of the optimizer's state; the rest are the weights' fp32 copies."""
    optimizer = state_of_parameter(experiment, 1).optimizer
    return 1 - _copy_bytes(experiment) / optimizer if optimizer else 0.0


def _copy_bytes(experiment: Experiment) -> float:
    """Bytes of a parameter's fp32 copy, which state_of_parameter counts with the moments."""
    return _whole_copy_bytes(experiment) * (1 - experiment.offload)


def _whole_copy_bytes(experiment: Experiment) -> int:
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

    layers: list[_Layer]
    output: Block | None
    """The last layer's."""
    called_with: list[Block | None]
    """What is free once the forward pass has returned."""
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
        self.stage = stage
        self.kinds = stages.on_stage(experiment, stage).kinds
        self.in_flight = [layers.kinds for layers in layers_in_flight(experiment, stage)]
        self.operations = {kind: layer_operations(experiment, kind) for kind in {*self.kinds}}
        self.in_graphs: dict[str, frozenset[int]] = {kind: frozenset() for kind in self.kinds}
        """The operations that graphs launch once they are captured."""
        self.moments: list[float] = []
        self.has_dummies = False
        self.has_workspace = {"forward": True, "backward": False}
        """Whether cuBLAS has its workspace in a thread; the forward pass's comes with the first."""
        self.without_copies: Counter[str] = Counter()
        """Layers whose weights are not quantised yet."""
        if experiment.quantised:
            self.without_copies = Counter(self.kinds)
        if stages.of_predictors(experiment) != experiment:
            del self.without_copies["predictors"]

    def build(self) -> None:
        """Allocate weights, gradients, fp32 copies and workspaces."""
        experiment, take = self.experiment, self.allocator.allocate_all
        dense, experts = self._parameters()
        replicas, sharded = experiment.replicas, experiment.sharding != "no_shard"
        of_experts = experiment.expert_replicas
        weights = take(element_bytes(experiment) * size for size in (*dense, *experts))
        if experiment.lora:
            dense, experts = self._adapters(), []
            take(element_bytes(experiment) * size for size in dense)
        groups = [(dense, replicas), (experts, of_experts)]
        states = [state_of_parameter(experiment, among) for _, among in groups]
        if sharded and not experiment.lora:
            # the distributed optimizer and both kinds of FSDP move weights to a buffer
            if experiment.fp8_params:
                take([state_on(experiment, self.stage).weights])
            else:
                for (sizes, _), state in zip(groups, states, strict=True):
                    take([state.weights * sum(sizes)])
            self.allocator.free(*weights)
        for (sizes, _), state in zip(groups, states, strict=True):
            take([state.gradients * sum(sizes)])
        instances = experiment.optimizer_instances
        shards = [
            _first_shard(sizes, max(among // instances, 1) if sharded else 1)
            for sizes, among in groups
        ]
        self._make_optimizer([*shards[0], *shards[1]])
        take(workspaces(experiment)[1:])

    def _make_optimizer(self, parameters: Sequence[float]) -> None:
        copy = _copy_bytes(self.experiment)
        self.allocator.allocate_all(copy * size for size in parameters)
        moment = (state_of_parameter(self.experiment, 1).optimizer - copy) / 2
        self.moments = [moment * size for size in parameters for _ in ("first", "second")]

    def make_moments(self) -> None:
        """Allocate the optimizer's moments, as its first step does."""
        self.allocator.allocate_all(self.moments)

    def step(self) -> None:
        """One step, with no more micro-batches than are in flight at most."""
        passes = [self._forward(kinds) for kinds in self.in_flight]
        for done in passes:
            self._backward(done)

    def capture(self) -> float:
        """Bytes that graphs reserve, in a pool of their own; empties the cache, as each capture
        does. From now on the operations in graphs allocate nothing else."""
        self.allocator.release_cache()
        eager, self.allocator = self.allocator, Allocator()
        everything = {kind: frozenset(range(len(self.operations[kind]))) for kind in self.kinds}
        graphed = {kind: graphed_operations(self.experiment, kind) for kind in self.kinds}
        self.in_graphs = {kind: everything[kind] - graphed[kind] for kind in self.kinds}
        in_flight = [self._layers_forward(kinds, None, ()) for kinds in self.in_flight]
        self.allocator.allocate_all(
            prepared_bytes(self.experiment, kind) for kinds in self.in_flight for kind in kinds
        )
        for layers, passing in in_flight:
            self.allocator.free(passing)
            self._layers_backward(layers, self.allocator.allocate(self.hidden), None)
        self.in_graphs = graphed
        pool, self.allocator = self.allocator, eager
        return pool.reserved

    def change_stream(self) -> None:
        """Go on in another stream, as _create_cudagraphs in
        megatron/core/transformer/cuda_graphs.py does: what the one before has cached stays reserved
        for it."""
        self.allocator.forget_cache()
        self.has_workspace = {"forward": False, "backward": False}

    def keep_static_inputs(self) -> None:
        for kinds in self.in_flight:
            self.allocator.allocate_all([self.hidden] * STATIC_INPUTS * len(kinds))

    def _parameters(self) -> tuple[list[int], list[int]]:
        """Elements of each parameter outside of experts and in experts, as they are constructed."""
        experiment = self.experiment
        dense, experts = [self.embedding] if self.first else [], []
        if self.first and experiment.model.position_embedding == "learned_absolute":
            positions = experiment.positions or experiment.seq_length
            dense.append(experiment.model.hidden_size * positions)
        for kind in self.kinds:
            of_layer, of_experts = _layer_parameters(experiment, kind)
            dense += of_layer
            experts += of_experts
        if self.last and (experiment.model.untie_embeddings or not self.first):
            dense.append(self.embedding)
        if "predictors" in self.kinds and not self.first and experiment.model.untie_embeddings:
            dense.append(self.embedding)
        return dense, experts

    def _adapters(self) -> list[int]:
        """Elements of each of LoRA's factors."""
        rank = self.experiment.lora.rank
        widths = adapter_widths(self.experiment).values()
        layer = [rank * width for both in widths for width in both]
        return layer * len(self.kinds)

    def _forward(self, kinds: Sequence[str]) -> _Pass:
        take, free = self.allocator.allocate, self.allocator.free
        experiment = self.experiment
        mask = experiment.micro_batch_size * experiment.seq_length**2 / experiment.cp
        seen = take(mask if experiment.attention_mask else 0)
        others: list[Block | None] = []
        embeddings: list[Block | None] = []
        if self.first and experiment.model.position_embedding == "learned_absolute":
            # words and positions outlive their sum
            # (megatron/core/models/common/embeddings/language_model_embedding.py)
            embeddings = self.allocator.allocate_all([self.hidden] * 2)
        total = take(self.hidden)
        passing = take(self.hidden)  # transposed
        free(total)
        if self.first and mask_bytes(experiment):
            others.append(take(mask_bytes(experiment)))
            dropped = take(self.hidden)
            free(passing)
            passing = dropped
        called_with = [seen]
        if kinds and 0 in self.in_graphs[kinds[0]]:  # a graph copies it
            called_with.append(passing)
            passing = None
        layers, passing = self._layers_forward(kinds, passing, embeddings)
        launched = not kinds or len(self.operations[kinds[-1]]) - 1 not in self.in_graphs[kinds[-1]]
        output = take(self.hidden if launched else 0)
        free(passing)
        if experiment.recompute == "full":  # keeps all that a layer is called with
            others += called_with
            called_with = []
        if not self.last:
            free(*called_with)
            called_with = []
        return _Pass(layers, output, called_with, others)

    def _layers_forward(
        self,
        kinds: Sequence[str],
        passing: Block | None,
        embeddings: Iterable[Block | None],
    ) -> tuple[list[_Layer], Block | None]:
        """Layers of ``kinds`` on one micro-batch; returns what they save, and the last's output."""
        layers = []
        for kind in kinds:
            if self.without_copies[kind]:
                self.without_copies[kind] -= 1
                self.allocator.allocate_all(self._quantised_copies(kind))
            if self.experiment.recompute == "full":
                kept = self.allocator.allocate(self.hidden)
                layer, passing = self._layer_forward(kind, passing, embeddings)
                self.allocator.free(*chain(*layer.blocks))
                layer = _Layer(kind, [[kept]], recomputed=True)
            else:
                layer, passing = self._layer_forward(kind, passing, embeddings)
            layers.append(layer)
            embeddings = ()
        return layers, passing

    def _quantised_copies(self, kind: str) -> list[float]:
        """Bytes of a layer's quantised weights, without the few of fp8's scales."""
        each = NVFP4_BYTES if self.experiment.precision == "fp4" else 1
        parameters = chain(*_layer_parameters(self.experiment, kind))
        matrices = (size for size in parameters if size > 2**20)
        return [each * size for size in matrices for _ in ("by rows", "by columns")]

    def _layer_forward(
        self, kind: str, passing: Block | None, embeddings: Iterable[Block | None] = ()
    ) -> tuple[_Layer, Block | None]:
        saved = []
        for index, operation in enumerate(self.operations[kind]):
            launched = index not in self.in_graphs[kind]
            saved.append(self.allocator.allocate_all(operation.saves if launched else ()))
            self.allocator.free(passing, *embeddings)
            embeddings = ()
            passing = self.allocator.allocate(operation.passing) if launched else None
        return _Layer(kind, saved), passing

    def _backward(self, done: _Pass) -> None:
        take, free = self.allocator.allocate, self.allocator.free
        tied = None
        if self.last:
            gradient, tied = self._loss(done.called_with)
        else:
            gradient = take(self.hidden)  # received
            self._multiply("backward")
            self._take_dummies()
        residual = take(self.hidden)
        free(gradient, done.output)
        residual = self._layers_backward(done.layers, residual, self._masked())
        if self.first and not self.experiment.lora:
            free(take(element_bytes(self.experiment) * self.embedding))
        free(residual, tied, *done.others)

    def _loss(self, called_with: Iterable[Block | None]) -> tuple[Block | None, Block | None]:
        """Logits, loss and the output layer's gradients; ``called_with`` is free once all have
        returned.

        Returns the gradient of its input, and the embedding's where both share a weight: autograd
        keeps it until it has the embedding's own.
        """
        take, free = self.allocator.allocate, self.allocator.free
        experiment, size = self.experiment, element_bytes(self.experiment)
        logits = logits_on(experiment)
        later = [self._kept_logits(logits) for _ in range(experiment.model.predictors)]
        normed = take(self.hidden)
        of_logits, kept = None, self._kept_logits(logits)
        for each in (kept, *later):
            free(of_logits)
            of_logits = each
            if loss_kind(experiment) != "te":
                of_logits = take(size * logits)
                free(each)
        free(*called_with)
        gradient = take(self.hidden)
        self._multiply("backward")
        free(take(gathered_bytes(experiment)))
        of_weight = take(weight_gradient_bytes(experiment, self.embedding))
        self._take_dummies()
        free(of_logits, normed)
        if self.first and not experiment.model.untie_embeddings:
            return gradient, of_weight
        free(of_weight)
        return gradient, None

    def _kept_logits(self, logits: float) -> Block | None:
        """Computes logits and loss; returns the softmax in fp32, which stays.

        Transformer Engine's loss leaves the logits' gradient in their place.
        """
        take, free = self.allocator.allocate, self.allocator.free
        computed, kind = take(element_bytes(self.experiment) * logits), loss_kind(self.experiment)
        self._multiply("forward")
        if kind == "te":
            return computed
        softmax = take(4 * logits)
        if kind == "native":
            written = take(4 * logits)
            free(softmax)
            softmax = written
        free(computed)
        return softmax

    def _layers_backward(
        self, layers: list[_Layer], residual: Block | None, gradient: Block | None
    ) -> Block | None:
        """All layers; returns the gradient of their input."""
        for layer in reversed(layers):
            kept: Iterable[Block | None] = ()
            if layer.recomputed:
                kept = chain(*layer.blocks)
                layer, passing = self._layer_forward(layer.kind, None)
                self.allocator.free(passing)
            gradient = self._layer_backward(layer, gradient)
            self.allocator.free(*kept)
        self.allocator.free(gradient)
        return residual

    def _layer_backward(self, layer: _Layer, gradient: Block | None) -> Block | None:
        """One layer; its gradients are added to the residual's in place."""
        take, free = self.allocator.allocate, self.allocator.free
        operations, again = self.operations[layer.kind], {}
        for index in reversed(range(len(operations))):
            if index in self.in_graphs[layer.kind]:
                continue
            one = operations[index]
            for other in regained(operations, index):
                again[other] = self.allocator.allocate_all(other.recomputed)
            of_input, of_weight = take(one.gradient), take(one.weight_gradient)
            free(take(one.gathered))
            blocks = [*layer.blocks[index], *again.get(one, ())]
            if one.adds_residual:
                free(gradient, of_input, *blocks)
                gradient = self._masked()
                continue
            free(of_weight)
            if of_input:
                free(gradient)
                gradient = of_input
            free(*blocks)
        return gradient

    def _multiply(self, thread: str) -> None:
        """cuBLAS's first product in a thread allocates its workspace, which stays: so does the
        segment that it lies in."""
        if not self.has_workspace[thread]:
            self.has_workspace[thread] = True
            self.allocator.allocate(WORKSPACE_BYTES)

    def _take_dummies(self) -> None:
        """Gradients that Transformer Engine returns where accumulation is fused, made once."""
        if not self.has_dummies:
            self.has_dummies = True
            sizes = dummy_gradients(self.experiment, self.stage)
            self.allocator.allocate_all(element_bytes(self.experiment) * size for size in sizes)

    def _masked(self) -> Block | None:
        """The gradient that dropout writes going backward; without dropout it is the residual's."""
        return self.allocator.allocate(self.hidden) if mask_bytes(self.experiment) else None


def _layer_parameters(experiment: Experiment, kind: str) -> tuple[list[int], list[int]]:
    """Elements of each parameter of a layer, outside of experts and in them."""
    model, tp = experiment.model, experiment.tp
    norm = [model.hidden_size] * (2 if model.normalization == "LayerNorm" else 1)
    more = []
    if kind == "predictors":
        more = [*norm * 3, *_weight_and_bias(linear_layers.of_predictor(model), tp)]
        kind = stages.predictor_kind(experiment)
    linears = linear_layers.of_layer(model, kind)
    dense = [*more]
    if "linear_proj" in linears:  # constructed first
        dense += _weight_and_bias(linears.pop("linear_proj"), tp)
    for one in linears.values():
        dense += _weight_and_bias(one, tp)
    if kind == "mamba":
        dense += mamba_vectors(model.mamba, tp)
    dense += norm * (2 if kind in ("dense", "experts") else 1)
    if kind != "experts":
        return dense, []
    expert = linear_layers.of_mlp(model, model.moe_ffn).values()
    one_expert = [size for one in expert for size in _weight_and_bias(one, experiment.etp)]
    held = model.num_experts // experiment.ep
    return [*dense, model.hidden_size * model.num_experts], one_expert * held


def _weight_and_bias(linear: linear_layers.Linear, tp: int) -> list[int]:
    inputs, outputs = linear.on_rank(tp)
    return [inputs * outputs, *([outputs] if linear.bias else [])]


def _first_shard(parameters: Sequence[int], replicas: int) -> list[int]:
    """What the first of ``replicas`` ranks has of each parameter, all of them in one buffer."""
    left = math.ceil(sum(parameters) / replicas)
    shard = []
    for size in parameters:
        shard.append(min(size, left))
        left -= shard[-1]
    return [size for size in shard if size]
