"""The CPU miniature of an experiment: the same parallel topology and schedule, a model small enough for a laptop.

Kept: every parallel degree up to eight processes, virtual stages, heads (and so heads per rank), micro-batch size and
count, sharding, recomputation, precision, and what an architecture is made of. Scaled: width, depth, sequence, windows,
vocabulary, experts and, but for conversations, steps.
A CPU has neither fp8 nor Transformer Engine's optimizer, so bf16 and fp32 stand in for both; nor has it CUDA graphs.
"""

from __future__ import annotations

from math import prod

from harness.data import prepared
from harness.experiment.catalog import Experiment, Model
from harness.experiment.overrides import MINIATURE_STEPS

MOST_PROCESSES = 8
HEAD_SIZE = 4
LAYERS_WITHOUT_PIPELINE = 2
SEQUENCE_SCALE = 32
CONVERSATION = 128
"""Tokens of a sequence at least, where conversations are to be learned."""
EXPERT_SCALE = 4
MOST_TOPK = 2
EXPERT_WIDTH = 16
VOCABULARY = 1024


def miniature(experiment: Experiment, nodes: int = 1) -> Experiment:
    """Scale ``experiment`` to at most eight CPU processes on ``nodes`` nodes.

    Raises UserError where the scaled sizes cannot fit together.
    """
    sizes = {axis: getattr(experiment, axis) for axis in ("dp", "tp", "pp", "cp")}
    while prod(sizes.values()) > MOST_PROCESSES and any(size % 2 == 0 for size in sizes.values()):
        largest = max((axis for axis in sizes if sizes[axis] % 2 == 0), key=sizes.__getitem__)
        sizes[largest] //= 2
    talks = prepared.is_chat(experiment.data)
    steps = experiment.until.miniature_steps if experiment.until else experiment.steps if talks else MINIATURE_STEPS
    chunks = 2 * sizes["cp"] * sizes["tp"]
    sequence = max(experiment.seq_length // SEQUENCE_SCALE // chunks, CONVERSATION // chunks if talks else 1) * chunks
    stage_ranks = prod(sizes.values()) // sizes["pp"]
    ep = min(experiment.ep, stage_ranks)
    model = experiment.model if experiment.weights else _miniature_model(experiment)
    return experiment.with_changes(
        **sizes,
        ep=ep,
        etp=min(experiment.etp, stage_ranks // ep),
        global_batch_size=experiment.global_batch_size * sizes["dp"] // experiment.dp,
        nodes=nodes,
        model=model,
        lr=_learning_rate(experiment, model) if talks else experiment.lr,
        seq_length=experiment.seq_length if "SEQ" in experiment.overrides else sequence,
        steps=experiment.steps if "STEPS" in experiment.overrides else steps,
        **(_intervals(experiment, steps) if experiment.until else {}),
        until=experiment.until and experiment.until.model_copy(
            update={"validation_loss": experiment.until.miniature_loss}
        ),
        card=None,
        miniature=True,
        precision="bf16" if experiment.precision == "fp8" else experiment.precision,
        fp8_recipe=None,
        optimizer_state="fp32",
        gradients="fp32",
        cuda_graphs=False,
    )


def describe(full: Experiment, small: Experiment) -> str:
    """One line that says what was scaled, for the terminal, the script and the run directory."""
    scaled = [
        ("processes", full.world_size, small.world_size),
        ("layers", full.model.num_layers, small.model.num_layers),
        ("hidden", full.model.hidden_size, small.model.hidden_size),
        ("sequence", full.seq_length, small.seq_length),
        ("vocabulary", full.model.vocab_size, small.model.vocab_size),
        ("experts", full.model.num_experts, small.model.num_experts),
        ("window", full.model.window_size, small.model.window_size),
        ("learning rate", full.lr, small.lr),
        ("precision", full.precision, small.precision),
        ("optimizer state", full.optimizer_state, small.optimizer_state),
        ("CUDA graphs", "on" if full.cuda_graphs else "off", "off"),
    ]
    changes = ", ".join(f"{what} {before} -> {after}" for what, before, after in scaled if before != after)
    return f"CPU miniature, not comparable with a GPU run{': ' * bool(changes)}{changes}"


def _learning_rate(experiment: Experiment, model: Model) -> float | None:
    """Where all weights learn, in inverse proportion to the width (Adam: Yang et al. 2022, arXiv:2203.03466, table 3)."""
    if experiment.lr is None or experiment.lora or "LR" in experiment.overrides:
        return experiment.lr
    return experiment.lr * experiment.model.hidden_size / model.hidden_size


def _intervals(experiment: Experiment, steps: int) -> dict[str, int]:
    """Evaluations and checkpoints of a long run: as many in the miniature's steps as in its own."""
    intervals = {"eval_interval": experiment.eval_interval, "save_every": experiment.save_every or experiment.steps}
    if "EVAL_EVERY" in experiment.overrides:
        del intervals["eval_interval"]
    return {key: max(1, every * steps // experiment.steps) for key, every in intervals.items()}


def _miniature_model(experiment: Experiment) -> Model:
    model = experiment.model
    stages = experiment.pp * experiment.vpp
    width = model.num_attention_heads * HEAD_SIZE
    scaled: dict[str, object] = {
        "num_layers": stages if stages > 1 else LAYERS_WITHOUT_PIPELINE,
        "hidden_size": width,
        "ffn_hidden_size": 4 * width if model.ffn_hidden_size else None,
        "vocab_size": _vocabulary(experiment),
    }
    if model.kv_channels:
        scaled["kv_channels"] = 2 * HEAD_SIZE  # wider than hidden_size / heads, as in the models that have it
    if model.window_size:
        scaled["window_size"] = max(model.window_size // SEQUENCE_SCALE, 1)
    if model.yarn:
        positions = max(model.yarn.original_max_position_embeddings // SEQUENCE_SCALE, 1)
        scaled["yarn"] = model.yarn.model_copy(update={"original_max_position_embeddings": positions})
    if model.num_experts:
        scaled |= {
            "num_experts": max(model.num_experts // EXPERT_SCALE, min(model.num_experts, MOST_PROCESSES)),
            "moe_router_topk": min(model.moe_router_topk or 1, MOST_TOPK),
            "moe_ffn_hidden_size": EXPERT_WIDTH,
        }
    return model.model_copy(update=scaled)


def _vocabulary(experiment: Experiment) -> int:
    if experiment.data == prepared.MOCK:
        return VOCABULARY
    return min(experiment.model.vocab_size, prepared.blend(experiment.data).sets[0].vocab_size)
