"""The CPU miniature of an experiment: the same parallel topology and schedule, a model small enough for a laptop.

Kept: every parallel degree up to eight processes, virtual stages, heads (and so heads per rank), micro-batch size and
count, sharding, recomputation, precision. Scaled: width, depth, sequence, vocabulary, experts and steps.
"""

from __future__ import annotations

from math import prod

from harness.catalog import Experiment, Model

MOST_PROCESSES = 8
HEAD_SIZE = 4
LAYERS_WITHOUT_PIPELINE = 2
SEQUENCE_SCALE = 32
EXPERT_SCALE = 4
MOST_TOPK = 2
EXPERT_WIDTH = 16
VOCABULARY = 1024
STEPS = 20


def miniature(experiment: Experiment, nodes: int = 1) -> Experiment:
    """Scale ``experiment`` to at most eight CPU processes on ``nodes`` nodes.

    Raises UserError where the scaled sizes cannot fit together.
    """
    sizes = {axis: getattr(experiment, axis) for axis in ("dp", "tp", "pp", "cp")}
    while prod(sizes.values()) > MOST_PROCESSES and any(size % 2 == 0 for size in sizes.values()):
        largest = max((axis for axis in sizes if sizes[axis] % 2 == 0), key=sizes.__getitem__)
        sizes[largest] //= 2
    chunks = 2 * sizes["cp"] * sizes["tp"]
    sequence = max(experiment.seq_length // SEQUENCE_SCALE // chunks, 1) * chunks
    stage_ranks = prod(sizes.values()) // sizes["pp"]
    ep = min(experiment.ep, stage_ranks)
    return experiment.with_changes(
        **sizes,
        ep=ep,
        etp=min(experiment.etp, stage_ranks // ep),
        global_batch_size=experiment.global_batch_size * sizes["dp"] // experiment.dp,
        nodes=nodes,
        model=_miniature_model(experiment),
        seq_length=experiment.seq_length if "SEQ" in experiment.overrides else sequence,
        steps=experiment.steps if "STEPS" in experiment.overrides else STEPS,
        card=None,
        miniature=True,
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
    ]
    return "CPU miniature, not comparable with a GPU run: " + ", ".join(
        f"{what} {before} -> {after}" for what, before, after in scaled if before != after
    )


def _miniature_model(experiment: Experiment) -> Model:
    model = experiment.model
    stages = experiment.pp * experiment.vpp
    return model.model_copy(
        update={
            "num_layers": stages if stages > 1 else LAYERS_WITHOUT_PIPELINE,
            "hidden_size": model.num_attention_heads * HEAD_SIZE,
            "ffn_hidden_size": 4 * model.num_attention_heads * HEAD_SIZE if model.ffn_hidden_size else None,
            "vocab_size": VOCABULARY if experiment.data == "mock" else model.vocab_size,
            **(
                {
                    "num_experts": model.num_experts // EXPERT_SCALE,
                    "moe_router_topk": min(model.moe_router_topk or 1, MOST_TOPK),
                    "moe_ffn_hidden_size": EXPERT_WIDTH,
                }
                if model.num_experts
                else {}
            ),
        }
    )
