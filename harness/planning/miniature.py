"""The CPU miniature of an experiment: the same parallel topology, a model that a laptop trains.

Kept: every parallel degree up to eight processes, virtual stages, heads (and so heads per rank),
micro-batch size, up to eight processes their count, sharding, recomputation, precision, and what an
architecture is made of.
Scaled: width, depth, sequence, windows, vocabulary, experts and, but for conversations, steps. A
CPU has neither fp8, fp4 nor Transformer Engine's optimizer, so bf16 and fp32 stand in for them; nor
has it CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import gcd, prod
from typing import Any

from harness.data import data_sets
from harness.experiment.command_line import EXPERIMENT_SETTINGS, FIELDS, MINIATURE_STEPS
from harness.experiment.constraints import divisors, with_changes
from harness.experiment.experiment import Experiment
from harness.experiment.model import MLP, Model
from harness.experiment.overrides import explicit_model
from harness.experiment.pipeline import EVEN_STAGES, chunk_layers, predictor_chunk

MOST_PROCESSES = 8
HEAD_SIZE = 4
MOST_HEADS = 32
"""Of a layer, where not all processes of a layout run."""
LAYERS_WITHOUT_PIPELINE = 2
SEQUENCE_SCALE = 32
CONVERSATION = 128
"""Tokens of a sequence at least, where conversations are to be learned."""
MOST_MICRO_BATCHES = 4
"""Of a step, where not all processes of a layout run."""
MAMBA_HEADS_OF_A_GROUP = 4
EXPERT_SCALE = 4
MOST_EXPERTS = 32
MOST_TOPK = 2
EXPERT_WIDTH = 16
VOCABULARY = 1024

NOT_ON_A_CPU = {
    "card": None,
    "fp8_recipe": None,
    "fp4_recipe": None,
    "optimizer_state": "fp32",
    "offload": 0.0,
    "gradients": "fp32",
    "fp8_params": False,
    "grouped_gemm": "streams",
    "router_fusion": False,
    "shared_expert_overlap": False,
    "cross_entropy_fusion_impl": "native",
    "cuda_graphs": False,
}
"""Fields that need a GPU, or Transformer Engine's optimizer, and what a miniature has instead."""


def miniature(
    experiment: Experiment, nodes: int = 1, given: Mapping[str, str] | None = None
) -> Experiment:
    """Scale ``experiment`` to at most eight CPU processes on ``nodes`` nodes.

    Args:
        given: the settings of the command line, also those that repeat a value of the catalogue.
            What they set is not scaled. The label names those that make another miniature.

    Raises UserError where the scaled sizes cannot fit together.
    """
    given = {**experiment.overrides, **(given or {})}
    model, degrees = experiment.model, _degrees(experiment)
    if not experiment.weights:
        model = explicit_model(experiment, _miniature_model(experiment, degrees))
    if experiment.uneven_pipeline and model.num_layers != experiment.model.num_layers:
        degrees |= _uneven_stages(experiment, degrees["pp"])
    unasked = _lengths(experiment, degrees, model, experiment.overrides.keys())
    lengths = _lengths(experiment, degrees, model, given.keys())
    named = {
        key
        for key in given
        if key in experiment.overrides or lengths.get(FIELDS[key]) != unasked.get(FIELDS[key])
    }
    until = experiment.until
    small = {
        **NOT_ON_A_CPU,
        **degrees,
        **_context_parallel(experiment, degrees["cp"]),
        **lengths,
        "miniature": True,
        "nodes": nodes,
        "model": model,
        "global_batch_size": _global_batch(experiment, degrees),
        "precision": "bf16" if experiment.quantised else experiment.precision,
        "until": until and until.model_copy(update={"validation_loss": until.miniature_loss}),
        "overrides": {s.key: given[s.key] for s in EXPERIMENT_SETTINGS if s.key in named},
    }
    return with_changes(experiment, **small)


def _degrees(experiment: Experiment) -> dict[str, Any]:
    """Parallel degrees of at most ``MOST_PROCESSES`` ranks: the largest even one is halved until
    they fit."""
    degrees = {axis: getattr(experiment, axis) for axis in ("dp", "tp", "pp", "cp")}
    while prod(degrees.values()) > MOST_PROCESSES and any(n % 2 == 0 for n in degrees.values()):
        largest = max((axis for axis in degrees if degrees[axis] % 2 == 0), key=degrees.get)
        degrees[largest] //= 2
    stage_ranks = prod(degrees.values()) // degrees["pp"]
    ep = min(experiment.ep, stage_ranks)
    return degrees | {"ep": ep, "etp": min(experiment.etp, stage_ranks // ep)}


def _context_parallel(experiment: Experiment, cp: int) -> dict[str, Any]:
    """Both levels of ``a2a+p2p`` while ``cp`` ranks make two, else a ring."""
    if experiment.cp_comm_type != "a2a+p2p":
        return {}
    fitting = [ranks for ranks in divisors(gcd(experiment.cp_levels[0], cp)) if 1 < ranks < cp]
    return {"cp_a2a": fitting[-1]} if fitting else {"cp_comm_type": "p2p", "cp_a2a": None}


def _global_batch(experiment: Experiment, degrees: Mapping[str, Any]) -> int:
    """As many micro-batches a step; of a layout over more processes than run, at most
    MOST_MICRO_BATCHES, in groups of the pipeline's size as interleaved stages take them."""
    micro_batches = experiment.num_microbatches
    if experiment.world_size > MOST_PROCESSES and micro_batches > MOST_MICRO_BATCHES:
        micro_batches = degrees["pp"] * max(1, MOST_MICRO_BATCHES // degrees["pp"])
    return micro_batches * experiment.micro_batch_size * degrees["dp"]


def _lengths(
    experiment: Experiment, degrees: Mapping[str, int], model: Model, given: Collection[str]
) -> dict[str, Any]:
    """Steps, intervals, sequence length and learning rate; what ``given`` settings set stays."""
    chat = data_sets.is_chat(experiment.data)
    if "STEPS" in given or (chat and not experiment.until):
        steps = experiment.steps
    else:
        steps = experiment.until.miniature_steps if experiment.until else MINIATURE_STEPS
    intervals = _intervals(experiment, steps) if experiment.until else {}
    if "EVAL_EVERY" in given or not intervals:
        intervals["eval_interval"] = experiment.eval_interval
    # Two chunks a rank of context parallelism, each split over tensor parallelism.
    chunks = 2 * degrees["cp"] * degrees["tp"]
    shortest = CONVERSATION // chunks if chat else 1
    sequence = max(experiment.seq_length // SEQUENCE_SCALE // chunks, shortest) * chunks
    scales_rate = chat and "LR" not in given
    return {
        "steps": steps,
        **intervals,
        "seq_length": experiment.seq_length if "SEQ" in given else sequence,
        "lr": _learning_rate(experiment, model) if scales_rate else experiment.lr,
    }


def describe(full: Experiment, small: Experiment) -> str:
    """One line that says what was scaled, for the terminal, the script and the run directory."""
    scaled = [
        ("processes", full.world_size, small.world_size),
        ("layers", full.model.num_layers, small.model.num_layers),
        ("heads", full.model.num_attention_heads, small.model.num_attention_heads),
        ("hidden", full.model.hidden_size, small.model.hidden_size),
        ("global batch", full.global_batch_size, small.global_batch_size),
        ("sequence", full.seq_length, small.seq_length),
        ("pattern", full.model.layer_pattern, small.model.layer_pattern),
        ("vocabulary", full.model.vocab_size, small.model.vocab_size),
        ("experts", full.model.num_experts, small.model.num_experts),
        ("dense layers", full.model.first_dense_layers, small.model.first_dense_layers),
        ("window", full.model.window_size, small.model.window_size),
        ("learning rate", full.lr, small.lr),
        ("context parallelism", full.cp_comm_type, small.cp_comm_type),
        ("precision", full.precision, small.precision),
        ("optimizer state", full.optimizer_state, small.optimizer_state),
        ("offloaded", full.offload, small.offload),
        ("CUDA graphs", "on" if full.cuda_graphs else "off", "off"),
    ]
    changes = ", ".join(
        f"{what} {before} -> {after}" for what, before, after in scaled if before != after
    )
    return f"CPU miniature, not comparable with a GPU run{': ' * bool(changes)}{changes}"


def _learning_rate(experiment: Experiment, model: Model) -> float | None:
    """Where all weights learn, in inverse proportion to the width (Adam: Yang et al. 2022,
    arXiv:2203.03466, table 3)."""
    if experiment.lr is None or experiment.lora:
        return experiment.lr
    return experiment.lr * experiment.model.hidden_size / model.hidden_size


def _intervals(experiment: Experiment, steps: int) -> dict[str, int]:
    """Evaluations and checkpoints of a long run: as many in the miniature's steps as in its own."""
    intervals = {
        "eval_interval": experiment.eval_interval,
        "save_every": experiment.save_every or experiment.steps,
    }
    return {key: max(1, every * steps // experiment.steps) for key, every in intervals.items()}


def _small_chunks(experiment: Experiment, pp: int) -> list[list[int]]:
    """Layers of each chunk of uneven stages, [stage][chunk]: where they are fewest one, else two.

    Of more than ``pp`` stages, the first and the last ones are left.
    """
    full = chunk_layers(experiment)
    kept = full[: pp - pp // 2] + full[len(full) - pp // 2 :]
    fewest = min(layers for stage in kept for layers in stage if layers)
    return [[min(layers, 1 + (layers > fewest)) for layers in stage] for stage in kept]


def _uneven_stages(experiment: Experiment, pp: int) -> dict[str, object]:
    """The fields that make a miniature's stages as uneven as those of ``experiment``."""
    if pp == 1:
        return EVEN_STAGES
    chunks = _small_chunks(experiment, pp)
    in_order = ["t" * stage[chunk] for chunk in range(experiment.vpp) for stage in chunks]
    stage, chunk = predictor_chunk(experiment)
    if stage >= pp - pp // 2:
        stage = max(stage - (experiment.pp - pp), pp - pp // 2)
    in_order[chunk * pp + stage] += "m" * experiment.model.predictors
    return {
        "first_stage_layers": sum(chunks[0]) if experiment.first_stage_layers else None,
        "last_stage_layers": sum(chunks[-1]) if experiment.last_stage_layers else None,
        "pp_layout": f"E{'|'.join(in_order)}L" if experiment.pp_layout else None,
    }


def _heads(experiment: Experiment, degrees: Mapping[str, Any]) -> dict[str, int | None]:
    """Heads of queries, and of keys, as many for each; all of them where all processes run."""
    heads, groups = experiment.model.num_attention_heads, experiment.model.num_query_groups
    if experiment.world_size > MOST_PROCESSES:
        ways = degrees["tp"] * (degrees["cp"] if "a2a" in experiment.cp_comm_type else 1)
        for keys in reversed(divisors(groups or heads)):
            fewer = keys * heads // (groups or heads)
            if fewer <= MOST_HEADS and keys % ways == 0:
                return {"num_attention_heads": fewer, "num_query_groups": groups and keys}
    return {"num_attention_heads": heads, "num_query_groups": groups}


def _miniature_model(experiment: Experiment, degrees: Mapping[str, Any]) -> Model:
    model, pp = experiment.model, degrees["pp"]
    stages = pp * experiment.vpp
    run = shortest_run(model.layer_pattern or "")
    if experiment.uneven_pipeline:
        stages = sum(map(sum, _small_chunks(experiment, pp)))
    heads = _heads(experiment, degrees)
    width = heads["num_attention_heads"] * HEAD_SIZE
    scaled: dict[str, object] = {
        **heads,
        "num_layers": stages if stages > 1 or run else LAYERS_WITHOUT_PIPELINE,
        "hidden_size": width,
        "ffn_hidden_size": 4 * width if model.ffn_hidden_size else None,
        "vocab_size": _vocabulary(experiment),
    }
    if mamba := model.mamba:
        if not experiment.uneven_pipeline:
            scaled["num_layers"] *= len(run)
        repeated = run * scaled["num_layers"]
        scaled["layer_pattern"] = repeated[: scaled["num_layers"]]
        scaled["mamba"] = mamba.model_copy(
            update={
                "head_dim": 2 * HEAD_SIZE,
                "num_heads": mamba.num_groups * MAMBA_HEADS_OF_A_GROUP,
                "state_dim": 4 * HEAD_SIZE,
            }
        )
    if model.kv_channels:
        # wider than hidden_size / heads, as in the models that have it
        scaled["kv_channels"] = 2 * HEAD_SIZE
    if model.window_size:
        scaled["window_size"] = max(model.window_size // SEQUENCE_SCALE, 1)
    if latent := model.latent_attention:
        # heads as wide as all others, ranks narrower than the hidden state and divisible by TP
        scaled["latent_attention"] = latent.model_copy(
            update={
                "q_lora_rank": width // 2 if latent.q_lora_rank else None,
                "kv_lora_rank": width // 4,
                "qk_head_dim": HEAD_SIZE,
                "qk_pos_emb_head_dim": 2 * HEAD_SIZE,
                "v_head_dim": HEAD_SIZE,
            }
        )
    elif model.yarn:
        positions = max(model.yarn.original_max_position_embeddings // SEQUENCE_SCALE, 1)
        scaled["yarn"] = model.yarn.model_copy(
            update={"original_max_position_embeddings": positions}
        )
    if model.num_experts:
        scaled |= {
            "num_experts": max(
                min(model.num_experts // EXPERT_SCALE, MOST_EXPERTS),
                min(model.num_experts, MOST_PROCESSES),
            ),
            "moe_router_topk": min(model.moe_router_topk or 1, MOST_TOPK),
            "moe_ffn_hidden_size": EXPERT_WIDTH,
            "first_dense_layers": min(model.first_dense_layers, 1),
        }
        if model.moe_shared_expert_intermediate_size:
            scaled["moe_shared_expert_intermediate_size"] = EXPERT_WIDTH
        if model.moe_router_group_topk:
            scaled["moe_router_group_topk"] = min(model.moe_router_group_topk, MOST_TOPK)
    return model.model_copy(update=scaled)


def shortest_run(pattern: str) -> str:
    """The shortest run of ``pattern`` with every kind of its layers, which may be a pattern itself;
    the first of several."""
    kinds = {*pattern}
    runs = (
        pattern[start : start + length]
        for length in range(len(pattern) + 1)
        for start in range(len(pattern) - length + 1)
    )
    return next(run for run in runs if {*run} == kinds and not run.startswith(MLP))


def _vocabulary(experiment: Experiment) -> int:
    if experiment.data == data_sets.MOCK:
        return VOCABULARY
    return min(experiment.model.vocab_size, data_sets.blend(experiment.data).sets[0].vocab_size)
