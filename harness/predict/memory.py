"""The memory that a rank takes at most, predicted tensor by tensor from an experiment's sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

from harness.experiment.experiment import Experiment
from harness.predict import stages
from harness.predict.activations import (
    attention_bytes,
    computed_bytes,
    layer_backward_bytes,
    loss_bytes,
    mamba_bytes,
    mlp_bytes,
    output_backward_bytes,
)
from harness.predict.context import context_gib
from harness.predict.elementwise import larger, smaller
from harness.predict.flops import (
    Held,
    State,
    dummy_gradients,
    parameters_on,
    quantised_weights,
    state_on,
)
from harness.predict.operations import (
    NVFP4_BYTES,
    element_bytes,
    gathered_bytes,
    hidden_bytes,
    mask_bytes,
)
from harness.predict.replay import (
    Footprint,
    layers_in_flight,
    moments_share,
    replay,
    workspaces,
)

GIB = 2**30
FSDP_PREFETCH_ELEMENTS = 5e8
"""suggested_AG_prefetch_size in megatron/core/distributed/fsdp/src/megatron_fsdp/megatron_fsdp.py.
"""


@dataclass(frozen=True)
class Memory:
    """GiB on the fullest rank, at the moment when most is allocated."""

    weights: float
    """With their quantised copies, and what FSDP has gathered."""
    gradients: float
    optimizer: float
    attention: float
    """Activations of attention or Mamba layers and their norm, in all layers."""
    mlp: float
    """Activations of MLPs or experts and their norm, in all layers."""
    passing: float
    """What exists only for a moment: logits, or a layer's tensors while it goes backward."""
    all_tensors: float
    """Like ``tensors``, with those that CUDA graphs hide from what counts as allocated."""
    context: float
    """Outside of PyTorch: CUDA's context, kernels, NCCL's buffers."""
    replayed: Callable[[], Footprint] = field(compare=False, repr=False)
    """Replays the rank's allocations, which takes some 20 ms, when a sum asks for it."""

    @cached_property
    def footprint(self) -> Footprint:
        return self.replayed()

    @property
    def pieces(self) -> dict[str, float]:
        """What tensors take, by name."""
        names = ("weights", "gradients", "optimizer", "attention", "mlp", "passing")
        return {name: getattr(self, name) for name in names}

    @property
    def tensors(self) -> float:
        return sum(self.pieces.values())

    @property
    def rounding(self) -> float:
        """Ends of blocks that no tensor uses: the allocator splits off no remainder up to 1 MiB."""
        return self.footprint.rounding / GIB

    @property
    def reserve(self) -> float:
        """What PyTorch reserves beyond what is allocated: holes in its cache, CUDA graphs' pool."""
        return (self.footprint.reserved - self.footprint.allocated) / GIB

    @property
    def activations(self) -> float:
        return self.attention + self.mlp + self.passing

    @property
    def total(self) -> float:
        """What tensors take, as torch.cuda.max_memory_allocated counts it."""
        return self.tensors + self.rounding

    @property
    def reserved(self) -> float:
        """What PyTorch takes from the GPU, as torch.cuda.max_memory_reserved counts it."""
        return self.total + self.reserve

    @property
    def in_all(self) -> float:
        """What nvidia-smi shows for the process."""
        return self.reserved + self.context


def predict(experiment: Experiment) -> Memory:
    """What ``experiment`` takes on its fullest rank.

    Of stages with the same layers, the first keeps most micro-batches; the last has the loss.
    Assumes that routers spread tokens evenly; otherwise the rank with most tokens needs more.
    """
    chunks = stages.all_chunks(experiment)
    compared = {*map(chunks.index, chunks), experiment.pp - 1}
    return max(
        (_on_stage(experiment, stage) for stage in compared), key=lambda memory: memory.tensors
    )


def _on_stage(experiment: Experiment, stage: int) -> Memory:
    stage_tensors = StageTensors(experiment, stage)
    tensors = stage_tensors.at_most()
    counted = tensors | _with_graphs(stage_tensors, tensors)
    return Memory(
        **{name: size / GIB for name, size in counted.items()},
        all_tensors=sum(tensors.values()) / GIB,
        context=context_gib(experiment),
        replayed=partial(replay, experiment, stage),
    )


class StageTensors:
    """Bytes of the tensors on a rank of pipeline stage ``stage``."""

    def __init__(self, experiment: Experiment, stage: int) -> None:
        self.experiment, self.stage = experiment, stage

    def at_most(self) -> dict[str, float]:
        """All at the fullest moment without CUDA graphs, named as Memory's pieces.

        Works with arrays of other methods' results as well: harness/search/estimates.py.
        """
        state, in_flight = self.state(), self.in_flight()
        mixing, others = self.kept()
        attention = sum(kept * number for kept, number in zip(mixing, in_flight, strict=True))
        mlp = sum(kept * number for kept, number in zip(others, in_flight, strict=True))
        hidden = smaller(state.gradients, attention + mlp) * self.gradients_grow()
        return {
            "weights": state.weights,
            "gradients": state.gradients - hidden,
            "optimizer": state.optimizer,
            "attention": attention,
            "mlp": mlp,
            # the optimizer's, once activations are gone
            "passing": larger(self.passing(), self.of_optimizer() - attention - mlp),
        }

    def passing(self) -> float:
        """What exists for a moment while losses and gradients are computed."""
        of_layer = 0.0
        for needed, number in zip(self.backward(), self.layers(), strict=True):
            of_layer = larger(of_layer, needed * (number > 0))
        return larger(of_layer + self.gathered_layer(), self.loss()) + self.ends()

    def state(self) -> State:
        """What stays from step to step, quantised copies too, and what FSDP always holds whole."""
        held = parameters_on(self.experiment, self.stage)
        copies = _quantised_bytes(self.experiment, self.stage)
        copies += _gathered_ends_bytes(self.experiment, held)
        dummies = element_bytes(self.experiment) * sum(dummy_gradients(self.experiment, self.stage))
        return state_on(self.experiment, self.stage) + State(copies, dummies, 0)

    def gradients_grow(self) -> bool:
        """Whether gradients grow while activations shrink: fully_shard has no gradient buffer."""
        sharding, micro_batches = self.experiment.sharding, self.experiment.num_microbatches
        return sharding == "torch_fsdp2" and micro_batches == 1

    def in_flight(self) -> stages.Layers:
        """Layers x micro-batches whose activations a rank keeps at most."""
        passes = layers_in_flight(self.experiment, self.stage)
        return stages.Layers(*map(sum, zip(*passes, strict=True)))

    def kept(self) -> tuple[stages.Layers, stages.Layers]:
        """What a micro-batch leaves in attention or a Mamba layer, and in an MLP or experts, by the
        layer's kind."""
        experiment, numbers = self.experiment, stages.of_model(self.experiment)._asdict()
        kinds = [kind for kind, number in numbers.items() if number]
        if experiment.recompute == "full":  # the layer's input
            return stages.Layers(**dict.fromkeys(kinds, hidden_bytes(experiment))), stages.Layers()
        mixing = {kind: attention_bytes(experiment) for kind in kinds if kind != "mlp"}
        if "predictors" in kinds:
            mixing["predictors"] = attention_bytes(stages.of_predictors(experiment))
        if "mamba" in kinds:
            mixing["mamba"] = mamba_bytes(experiment)
        others = {
            kind: mlp_bytes(experiment, kind)
            for kind in kinds
            if kind not in ("mamba", "attention")
        }
        return stages.Layers(**mixing), stages.Layers(**others)

    def backward(self) -> stages.Layers:
        """Bytes that a layer of each kind needs while it goes backward, beyond what is kept of it:
        recomputed activations, too."""
        experiment, of_model = self.experiment, stages.of_model(self.experiment)
        needed = {}
        for kind, number in of_model._asdict().items():
            if number:
                needed[kind] = layer_backward_bytes(experiment, kind)
                if experiment.recompute == "full":
                    needed[kind] += computed_bytes(experiment, kind)
        return stages.Layers(**needed)

    def layers(self) -> stages.Layers:
        """Number of the stage's layers of each kind."""
        return stages.on_stage(self.experiment, self.stage)

    def of_optimizer(self) -> float:
        """What exists while the optimizer steps: a rank's share of gradients in fp32, where they
        are summed in bf16 for fp32 moments, and of new weights in bf16, where weights are in fp8.

        Source: _copy_model_grads_to_main_grads in megatron/core/optimizer/distrib_optimizer.py;
        quantize_master_weights in transformer_engine/pytorch/tensor/utils.py.
        """
        experiment = self.experiment
        shards = experiment.replicas if experiment.sharding == "optim" else 1
        shards = max(shards // experiment.optimizer_instances, 1)
        held = 0.0
        if experiment.gradients != "fp32" and not experiment.precision_aware:
            held = 2 * state_on(experiment, self.stage).gradients / shards
        if experiment.fp8_params:
            of_stage = parameters_on(experiment, self.stage)
            held += 2 * (of_stage.matrices + of_stage.expert_matrices) / shards
        return held

    def gathered_layer(self) -> float:
        held = parameters_on(self.experiment, self.stage)
        return _gathered_layer_bytes(self.experiment, held, self.stage)

    def loss(self) -> float:
        """What logits, their loss and the output layer's backward pass need, on the last stage."""
        experiment = self.experiment
        if self.stage != experiment.pp - 1:
            return 0.0
        return max(loss_bytes(experiment), output_backward_bytes(experiment))

    def ends(self) -> float:
        return _ends_bytes(self.experiment, self.stage)


def _with_graphs(stage: StageTensors, tensors: Mapping[str, float]) -> dict[str, float]:
    """The pieces of ``tensors`` that count otherwise with upstream's own CUDA graphs.

    Tensors of a captured layer count as free once its graph is made. So most is allocated in the
    first step, which runs without graphs and before the optimizer has moments, or in later steps.
    Transformer Engine captures after whole steps.
    """
    experiment = stage.experiment
    if experiment.graphs_by != "local":
        return {}
    moments = tensors["optimizer"] * moments_share(experiment)
    passing, kept = stage.passing(), tensors["attention"] + tensors["mlp"]
    later = max(passing, stage.of_optimizer())
    if kept + passing > moments + later:
        return {"optimizer": tensors["optimizer"] - moments, "passing": passing}
    return {"attention": 0.0, "mlp": 0.0, "passing": later}


def _ends_bytes(experiment: Experiment, stage: int) -> float:
    """Bytes outside of layers: mask, workspaces, embedding's dropout, last norm, logits' input."""
    mask = experiment.rank_tokens * experiment.seq_length
    ends = (mask if experiment.attention_mask else 0) + sum(workspaces(experiment))
    if stage == 0:
        ends += mask_bytes(experiment)
    if stage == experiment.pp - 1:
        # the logits' input, gathered into a buffer that stays (get_global_memory_buffer in
        # megatron/core/tensor_parallel/layers.py)
        ends += 2 * hidden_bytes(experiment) + gathered_bytes(experiment)
    return ends


def _quantised_bytes(experiment: Experiment, stage: int) -> float:
    """Bytes of the quantised weights that Transformer Engine caches, by rows and by columns.

    Source: quantize_weight and _fp8_workspaces in transformer_engine/pytorch/module. Blockwise
    scales are fp32, one for 128 x 128 weights; those of mxfp8 take a byte for 32, and so do those
    of nvfp4 for 16: a scale of 16 x 16 weights is stored for each of their rows.
    """
    each = 1 + {"blockwise": 4 / 128**2, "mxfp8": 1 / 32}.get(experiment.recipe, 0)
    if experiment.precision == "fp4":
        each = NVFP4_BYTES
    return 2 * quantised_weights(experiment, stage) * each


def _gathered_ends_bytes(experiment: Experiment, held: Held) -> float:
    """Bytes of embeddings, last norm and output layer, which Megatron-FSDP always holds whole.

    Its units are layers: fsdp_unit_modules in
    megatron/core/distributed/fsdp/mcore_fsdp_adapter.py.
    """
    if experiment.sharding != "fsdp_optim_grads_params":
        return 0
    return held.ends * element_bytes(experiment)


def _gathered_layer_bytes(experiment: Experiment, held: Held, stage: int) -> float:
    """Bytes of the layers gathered while one goes backward.

    FSDP2 prefetches one layer, Megatron-FSDP FSDP_PREFETCH_ELEMENTS.
    """
    layers = stages.on_stage(experiment, stage).total
    if not experiment.shards_weights or not layers:
        return 0
    layer = (held.dense - held.ends + held.experts) / layers
    fsdp2 = experiment.sharding == "torch_fsdp2"
    ahead = 1 if fsdp2 else math.ceil(FSDP_PREFETCH_ELEMENTS / layer)
    return min(1 + ahead, layers) * layer * element_bytes(experiment)
