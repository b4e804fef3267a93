"""What must hold between a model, its parallel sizes and its batch, checked before anything runs.

Each rule gives the formula with its values and a way out, so that nothing is truncated silently
and nothing fails minutes later inside upstream. Sources: ``validate_args`` in
megatron/training/arguments.py, ``__post_init__`` in
megatron/core/transformer/transformer_config.py, megatron/core/parallel_state.py and
megatron/core/pipeline_parallel/schedules.py of core_v0.19.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from harness.errors import UserError, indivisible
from harness.experiment import architecture
from harness.experiment.experiment import RECOMPUTABLE, Experiment
from harness.experiment.hardware import Card, find_card
from harness.experiment.linear_layers import of_attention
from harness.experiment.model import Model
from harness.experiment.pipeline import layer_ranges
from harness.system import yaml_files

_MOST_CHOICES = 8
"""That a message lists."""


def checked(fields: Mapping[str, Any], where: str) -> Experiment:
    """The experiment of ``fields``.

    Raises:
        UserError: a field is wrong or a rule is broken; a line for each, after ``where``.
    """
    experiment = yaml_files.build(Experiment, fields, where)
    if broken := list(violations(experiment)):
        raise UserError("\n".join(f"{where}: {sentence}" for sentence in broken))
    return experiment


def with_changes(experiment: Experiment, **changes: Any) -> Experiment:
    """A copy of ``experiment`` with ``changes`` (field names). Raises UserError as ``checked``."""
    fields = {name: getattr(experiment, name) for name in Experiment.model_fields}
    return checked({**fields, **changes}, experiment.id)


def violations(experiment: Experiment) -> Iterator[str]:
    """One sentence for each rule that ``experiment`` breaks; none where it can run."""
    for rule in RULES:
        yield from rule(experiment)


def divisors(n: int) -> list[int]:
    """Every whole number that divides ``n``, in order."""
    low = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return [*low, *(n // k for k in reversed(low) if k * k != n)]


def _try(name: str, choices: Iterable[int], wanted: int) -> str:
    """The valid ``choices`` nearest to ``wanted``, as a way out."""
    near = sorted(sorted(choices, key=lambda k: abs(k - wanted))[:_MOST_CHOICES])
    return f"try {name} in {{{', '.join(map(str, near))}}}" if near else f"no {name} fits"


def _learning_rate(experiment: Experiment) -> Iterator[str]:
    lowest, highest = experiment.lowest_lr, experiment.highest_lr
    warmup, decay = experiment.lr_warmup_steps or 0, experiment.lr_decay_steps
    if lowest > highest:
        yield f"min_lr {lowest:g} must not be above lr {highest:g}"
    if warmup >= decay:
        yield f"lr_warmup_steps {warmup} must be below the {decay} steps in which the rate decays"


def _widths(experiment: Experiment) -> Iterator[str]:
    model, tp = experiment.model, experiment.tp
    heads, groups = model.num_attention_heads, model.num_query_groups
    if not (model.kv_channels or model.latent_attention) and (
        broken := indivisible("hidden_size", model.hidden_size, "num_attention_heads", heads)
    ):
        yield broken
    if broken := indivisible("num_attention_heads", heads, "TP", tp):
        yield f"{broken}; {_try('TP', divisors(heads), tp)}"
    elif broken := indivisible("ffn_hidden_size", model.ffn, "TP", tp):
        yield f"{broken}; {_try('TP', divisors(math.gcd(heads, model.ffn)), tp)}"
    if not groups:
        return
    if broken := indivisible("num_attention_heads", heads, "num_query_groups", groups):
        yield broken
    if groups % tp and tp % groups:
        yield f"of num_query_groups ({groups}) and TP ({tp}), one must be divisible by the other"


def _stages(experiment: Experiment) -> Iterator[str]:
    pp, vpp, said = experiment.pp, experiment.vpp, _uneven_by(experiment)
    if said and pp == 1:
        yield f"{', '.join(said)}: layers are divided among stages, but PP=1; set PP > 1"
        return
    if len(said) > 1 and said not in (_ENDS, _COUNTED):
        yield f"{' and '.join(said)} contradict each other; upstream takes one of them"
        return
    try:
        layer_ranges(experiment)
    except UserError as error:
        yield f"{error}{'' if said else _ways_to_divide(experiment)}"
    if vpp > 1 and pp == 1:
        yield f"VPP={vpp} interleaves pipeline stages, but PP=1; set PP > 1 or VPP=1"


_ENDS = ["FIRST_STAGE_LAYERS", "LAST_STAGE_LAYERS"]
_COUNTED = ["EMBEDDING_AS_LAYER", "LOSS_AS_LAYER"]


def _uneven_by(experiment: Experiment) -> list[str]:
    """The settings that make its stages uneven."""
    return [
        name
        for name in (*_ENDS, *_COUNTED, "PP_LAYOUT")
        if getattr(experiment, name.lower()) not in (None, False)
    ]


def _ways_to_divide(experiment: Experiment) -> str:
    """Ways out where the layers do not divide evenly."""
    layers, pp, vpp = experiment.model.num_layers, experiment.pp, experiment.vpp
    if vpp > 1 and layers % pp == 0:
        even = _try("VPP", divisors(layers // pp), vpp)
    else:
        even = _try("PP", [] if layers % vpp else divisors(layers // vpp), pp)
    missing = -layers % (pp * vpp)
    uneven = f", or {'=1 '.join(_COUNTED[-missing:])}=1" if pp > 1 and missing <= 2 else ""
    return f"; {even}{uneven}"


def _batch(experiment: Experiment) -> Iterator[str]:
    pp, vpp = experiment.pp, experiment.vpp
    mbs, gbs, dp = experiment.micro_batch_size, experiment.global_batch_size, experiment.dp
    if broken := indivisible("GBS", gbs, "MBS x DP", mbs, dp):
        per_rank, rest = divmod(gbs, dp)
        if rest or not per_rank:
            yield f"{broken}; set GBS to a multiple of {mbs * dp}"
        else:
            smaller = _try("MBS", divisors(per_rank), mbs)
            yield f"{broken}; {smaller}, or GBS a multiple of {mbs * dp}"
    elif vpp > 1 and pp > 1 and experiment.num_microbatches % pp:
        micro_batches = "micro-batches GBS / (MBS x DP)"
        yield (
            f"{indivisible(micro_batches, experiment.num_microbatches, 'PP', pp)} when VPP > 1;"
            f" set GBS to a multiple of {mbs * dp * pp}, or VPP=1"
        )


def _sequence(experiment: Experiment) -> Iterator[str]:
    model, tp, cp = experiment.model, experiment.tp, experiment.cp
    length, learned = experiment.seq_length, experiment.positions
    # each rank gets two chunks, an early and a late one, so that causal work is balanced
    if cp > 1 and (broken := indivisible("SEQ", length, "2 x CP", 2, cp)):
        fitting = [size for size in range(1, 65) if length % (2 * size) == 0]
        yield f"{broken}, since each rank holds two chunks; {_try('CP', fitting, cp)}"
    if learned and model.position_embedding == "learned_absolute" and length > learned:
        yield f"SEQ={length}: positions were learned up to {learned}; set SEQ={learned} or less"
    yield from _context_parallel_levels(experiment)
    if experiment.sequence_parallel and tp == 1:
        yield "SP=1 splits activations over TP, but TP=1; set TP > 1 or SP=0"
    if experiment.tp_overlap and not experiment.sequence_parallel:
        yield "TP_OVERLAP=1 overlaps the exchanges of sequence parallelism; set SP=1 (TP > 1)"
    if experiment.sequence_parallel and length // cp % tp:
        yield (
            f"SEQ / CP ({length} / {cp}) must be divisible by TP ({tp}) for sequence parallelism"
        )


def _context_parallel_levels(experiment: Experiment) -> Iterator[str]:
    cp, how, typed = experiment.cp, experiment.cp_comm_type, experiment.cp_a2a
    if typed and how != "a2a+p2p":
        yield f"CP_A2A={typed} is about CP_COMM_TYPE=a2a+p2p, not {how}; leave it out"
    elif typed and (cp % typed or not 1 < typed < cp):
        fitting = _try("CP_A2A", divisors(cp)[1:-1], typed)
        yield f"CP_A2A={typed} must divide CP ({cp}) and lie between 1 and CP; {fitting}"
    elif cp > 1 and how == "a2a+p2p" and experiment.cp_levels[0] == 1:
        yield (
            f"a2a+p2p exchanges heads between 2 or more of CP={cp} ranks, fewer than all: no such"
            " number divides CP and the heads of a TP rank and fits a node; set CP_COMM_TYPE=p2p or"
            " a2a"
        )
    elif experiment.exchanges_heads:
        yield from _heads_by_all_to_all(experiment)


def _heads_by_all_to_all(experiment: Experiment) -> Iterator[str]:
    """Transformer Engine's flash_attn_a2a_communicate views heads as [ranks, heads / ranks]."""
    tp, model, ranks = experiment.tp, experiment.model, experiment.cp_levels[0]
    how, size = experiment.cp_comm_type, "CP" if experiment.cp_comm_type == "a2a" else "CP_A2A"
    heads = {"num_attention_heads": model.num_attention_heads, "num_query_groups": model.key_heads}
    for name, number in heads.items():
        if broken := indivisible(name, number, f"TP x {size}", tp, ranks):
            fitting = divisors(max(number // tp, 1))
            if size == "CP_A2A":
                fitting = [n for n in fitting if experiment.cp % n == 0 and 1 < n < experiment.cp]
            smaller = _try(size, fitting, ranks)
            yield f"{how} splits heads over {size}: {broken}; {smaller}, or CP_COMM_TYPE=p2p"
            return


def _experts(experiment: Experiment) -> Iterator[str]:
    model, ep, etp = experiment.model, experiment.ep, experiment.etp
    experts = model.num_experts
    if experts is None:
        if ep > 1 or etp > 1:
            yield f"EP={ep}, ETP={etp} split experts, but {model.name} has none; set EP=1 ETP=1"
        of_experts = {
            "MOE_DISPATCHER": experiment.moe_dispatcher != "alltoall",
            "MOE_BACKEND": experiment.moe_backend != "deepep",
            "MOE_CAPACITY": experiment.moe_capacity,
            "ROUTER_FUSION": experiment.router_fusion,
            "SHARED_EXPERT_OVERLAP": experiment.shared_expert_overlap,
            "EP_OVERLAP": experiment.ep_overlap,
            "DELAY_WGRAD": experiment.delay_wgrad,
            "GROUPED_GEMM": experiment.grouped_gemm != "streams",
        }
        for setting in (key for key, given in of_experts.items() if given):
            yield f"{setting} is about experts, and {model.name} has none; leave it out"
        return
    if broken := indivisible("experts", experts, "EP", ep):
        yield f"{broken}; {_try('EP', divisors(experts), ep)}"
    if broken := indivisible("moe_ffn_hidden_size", model.moe_ffn, "ETP", etp):
        yield broken
    shared = model.moe_shared_expert_intermediate_size or 0
    if broken := indivisible("moe_shared_expert_intermediate_size", shared, "TP", experiment.tp):
        yield broken
    if model.add_bias_linear and etp > 1:
        yield f"ETP={etp}: upstream splits only experts without biases; set ETP=1"
    if model.moe_router_topk > experts:
        yield f"moe_router_topk ({model.moe_router_topk}) exceeds the number of experts ({experts})"
    stage = experiment.world_size // experiment.pp
    if broken := indivisible("ranks of a stage, TP x CP x DP", stage, "EP x ETP", ep, etp):
        fitting = [n for n in divisors(math.gcd(stage, experts)) if stage % (n * etp) == 0]
        yield f"{broken}; {_try('EP', fitting, ep)}"
    yield from _routed_tokens(experiment)
    yield from _grouped_gemm(experiment)
    if experiment.tp > 1 and not experiment.sequence_parallel:
        yield f"experts with TP={experiment.tp} need sequence parallelism; set SP=1"


def _entry(experiment: Experiment) -> Iterator[str]:
    """What HybridModel lacks of a GPT, or nobody has tried with it here."""
    if experiment.entry == "gpt":
        return
    model = experiment.model
    lacking = {
        "rope_scaling_factor": model.rope_scaling_factor,
        "window_size, whose layers are counted otherwise": model.window_size,
        "qk_norm projection": model.qk_norm == "projection",
        "MTP": model.predictors,
        "LORA_RANK": experiment.lora,
        "EP_OVERLAP=1": experiment.ep_overlap,
        "CUDA_GRAPHS=1": bool(experiment.cuda_graphs),
        "PP_LAYOUT": experiment.pp_layout,
        f"SHARDING={experiment.sharding}": experiment.sharding not in ("no_shard", "optim"),
    }
    way_out = "leave it out" if model.mamba else "set ENTRY=gpt"
    for what in (name for name, given in lacking.items() if given):
        yield f"ENTRY=hybrid does not have, or is not tested with, {what}; {way_out}"


def _shared_expert_overlap(experiment: Experiment) -> Iterator[str]:
    """Rules of TransformerConfig.__post_init__ in megatron/core/transformer."""
    if not experiment.shared_expert_overlap:
        return
    model, how = experiment.model, experiment.moe_dispatcher
    if not model.moe_shared_expert_intermediate_size:
        yield f"SHARED_EXPERT_OVERLAP=1: {model.name} has no shared expert; leave it out"
    if how == "allgather":
        yield "SHARED_EXPERT_OVERLAP=1 needs MOE_DISPATCHER=alltoall or flex, not allgather"
    if experiment.ep_overlap:
        yield "EP_OVERLAP=1 overlaps the shared expert too; set SHARED_EXPERT_OVERLAP=0"
    if "shared_experts" in experiment.recompute_modules:
        yield (
            "SHARED_EXPERT_OVERLAP=1 cannot recompute the shared expert; leave shared_experts out"
            " of RECOMPUTE_MODULES"
        )


def _grouped_gemm(experiment: Experiment) -> Iterator[str]:
    """What Transformer Engine multiplies in one launch.

    cublas: ``is_module_grouped_tensor_path_supported`` (pytorch/module/grouped_linear.py); cutlass:
    ``nvte_multi_tensor_gemm`` (common/gemm/cublaslt_gemm.cu). Otherwise it takes a product each.
    """
    kernel, card = experiment.grouped_gemm, find_card(experiment.card or "")
    if kernel == "streams":
        return
    if experiment.precision == "fp32":
        yield f"GROUPED_GEMM={kernel} is for bf16, fp8 and fp4, not for fp32; leave it out"
    if card and not card.multiplies_groups(kernel):
        yield f"GROUPED_GEMM={kernel} does not run on {card.name}; leave it out"
    if kernel == "cublas" and experiment.fp8_recipe == "delayed":
        yield "GROUPED_GEMM=cublas: not with FP8=delayed; set FP8=tensorwise or blockwise"
    if kernel in ("cutlass", "fused") and experiment.quantised:
        setting = experiment.precision.upper()
        yield f"GROUPED_GEMM={kernel} is for bf16; set GROUPED_GEMM=cublas, or {setting}=0"
    if kernel == "fused":
        yield from _fused_experts(experiment)


def _fused_experts(experiment: Experiment) -> Iterator[str]:
    """``TEGroupedMLP._is_fused_impl_supported`` (megatron/core/transformer/moe/experts.py).

    It recomputes no activation, Megatron-FSDP knows no grouped weights (training/arguments.py), and
    Muon and adapters take a weight for a matrix.
    """
    model = experiment.model
    lacking = {
        f"ETP={experiment.etp}": experiment.etp > 1,
        f"the activation {model.activation}": model.activation
        not in ("swiglu", "clamped_quick_geglu"),
        "RECOMPUTE_MODULES=moe_act": "moe_act" in experiment.selectively_recomputed,
        f"SHARDING={experiment.sharding}": experiment.fully_sharded,
        f"OPTIMIZER={experiment.optimizer}": experiment.optimizer == "muon",
        "LORA_RANK": experiment.lora,
    }
    for what in (name for name, given in lacking.items() if given):
        yield f"GROUPED_GEMM=fused does not take {what}; set GROUPED_GEMM=cublas"


def _routed_tokens(experiment: Experiment) -> Iterator[str]:
    how, ranks = experiment.moe_dispatcher, experiment.ep * experiment.etp
    if how == "flex" and ranks == 1:
        yield "MOE_DISPATCHER=flex sends tokens between ranks; set EP > 1, or alltoall"
    if how != "flex" and experiment.moe_backend != "deepep":
        yield f"MOE_BACKEND={experiment.moe_backend} is for MOE_DISPATCHER=flex, not {how}"
    yield from _shared_expert_overlap(experiment)
    yield from _delayed_gradients(experiment)
    if not experiment.ep_overlap:
        return
    if experiment.ep == 1 or how == "allgather":
        yield (
            f"EP_OVERLAP=1 needs EP > 1 and MOE_DISPATCHER=alltoall or flex, not EP={experiment.ep}"
            f" and {how}"
        )
    if experiment.pp > 1 and experiment.vpp == 1:
        yield f"EP_OVERLAP=1 with PP={experiment.pp} needs virtual stages; set VPP > 1"
    if experiment.recompute == "full" or "moe" in experiment.recompute_modules:
        yield "EP_OVERLAP=1 cannot recompute experts; set RECOMPUTE=none or selective, without moe"


def _delayed_gradients(experiment: Experiment) -> Iterator[str]:
    """Rules of ``validate_args``, of TransformerConfig.__post_init__, and of Transformer Engine's
    ``WeightGradStore`` (pytorch/module/_common.py)."""
    if not experiment.delay_wgrad:
        return
    if not experiment.ep_overlap:
        yield (
            "DELAY_WGRAD=1 computes weights' gradients while EP_OVERLAP=1 sends another"
            " micro-batch's tokens; set EP_OVERLAP=1, or DELAY_WGRAD=0"
        )
    if experiment.tp_overlap:
        yield (
            "DELAY_WGRAD=1: with TP_OVERLAP=1 Transformer Engine exchanges beside the product of a"
            " weight's gradient, which it cannot delay then; set TP_OVERLAP=0"
        )
    if experiment.lora:
        yield "DELAY_WGRAD=1: frozen weights have no gradients; leave it out with LoRA"
    yield from _delayed_in_graphs(experiment)


def _delayed_in_graphs(experiment: Experiment) -> Iterator[str]:
    """What a CUDA graph of delayed gradients needs where replicas exchange gradients meanwhile."""
    model, graphed = experiment.model, experiment.graphed
    shared = model.moe_shared_expert_intermediate_size and not experiment.shared_expert_overlap
    captures = "attn" in graphed or ("moe_router" in graphed and shared)
    if not captures or experiment.sharding == "no_shard" or not experiment.overlap:
        return
    said = f"DELAY_WGRAD=1 with CUDA_GRAPHS={','.join(graphed)}"
    if not experiment.gradient_fusion:
        yield f"{said}: a graph adds gradients up at fixed addresses only; set GRAD_FUSION=1"
    if "attn" in graphed and model.add_bias_linear:
        yield f"{said}: gradients of attention's biases cannot be captured; leave attn out"


def _nodes(experiment: Experiment) -> Iterator[str]:
    if broken := indivisible("TP x PP x CP x DP", experiment.world_size, "NODES", experiment.nodes):
        yield f"{broken}; {_try('NODES', divisors(experiment.world_size), experiment.nodes)}"


def _architecture(experiment: Experiment) -> Iterator[str]:
    model = experiment.model
    if (model.position_embedding == "yarn") != (model.yarn is not None):
        yield (
            f"position_embedding {model.position_embedding}, yarn"
            f" {'given' if model.yarn else 'missing'}: set both or neither"
        )
    if model.qk_norm == "projection":
        if model.normalization != "RMSNorm":
            yield "qk_norm projection is an RMS norm; set normalization: RMSNorm"
        if broken := indivisible(
            "qk_norm projection: key heads", model.key_heads, "TP", experiment.tp
        ):
            yield broken
    how = experiment.cp_comm_type
    if experiment.cp > 1 and how != "a2a" and (model.window_size or model.attention_sinks):
        yield f"windows and sinks need context parallelism by CP_COMM_TYPE=a2a, not {how}"


WITHOUT_MXFP8 = (
    "{} has no tensor cores that scale by 32 values, as Blackwell has; set FP8=blockwise or"
    " tensorwise"
)


def without_nvfp4(card: Card) -> str:
    """Why ``card`` does not compute in NVFP4, and what it can do in its place.

    Source: ``_compute_nvfp4_support`` in transformer_engine/pytorch/quantization.py.
    """
    instead = "FP8=tensorwise in its place" if card.fp8_tflops else "FP4=0"
    return (
        f"{card.name} has no tensor cores for it; Transformer Engine asks for compute capability"
        f" 10.0 (Blackwell) or higher; set {instead}"
    )


def _fp8(experiment: Experiment) -> Iterator[str]:
    recipe = experiment.fp8_recipe
    if recipe and experiment.fp4_recipe:
        return  # _fp4 says so
    if (experiment.precision == "fp8") != (recipe is not None):
        yield (
            f"precision {experiment.precision}, fp8_recipe {recipe}: fp8, and nothing else, needs a"
            " recipe: delayed, tensorwise, blockwise or mxfp8"
        )
    if experiment.fp8_params and (
        experiment.precision != "fp8" or experiment.sharding != "optim" or experiment.lora
    ):
        yield (
            "FP8_PARAMS=1 is for trained weights with FP8= and SHARDING=optim, not for"
            f" {'frozen ones' if experiment.lora else experiment.precision} with"
            f" {experiment.sharding}"
        )
    if experiment.precision != "fp8":
        return
    card = find_card(experiment.card or "")
    if card and card.fp8_tflops is None:
        yield (
            f"precision fp8: {card.name} has none (Ada, Hopper and later do); leave CARD= out, or"
            " choose a bf16 row"
        )
    if card and recipe == "mxfp8" and not card.is_blackwell:
        yield f"FP8=mxfp8: {WITHOUT_MXFP8.format(card.name)}"
    if recipe == "mxfp8" and experiment.fp8_params:
        yield "FP8_PARAMS=1 with FP8=mxfp8 is not tested; set FP8_PARAMS=0"
    yield from _multiplied_in_blocks(experiment)
    discarded = sorted({"layernorm", "moe_act"} & set(experiment.recompute_modules))
    if recipe == "delayed" and discarded:
        yield (
            f"fp8 delayed cannot recompute {', '.join(discarded)}, whose outputs are discarded; "
            "set fp8_recipe tensorwise or blockwise"
        )


def _fp4(experiment: Experiment) -> Iterator[str]:
    """Rules of ``validate_args`` and Transformer Engine, and what upstream would leave in bf16."""
    recipe, card = experiment.fp4_recipe, find_card(experiment.card or "")
    if recipe and experiment.fp8_recipe:
        yield (
            f"FP4={recipe} and FP8={experiment.fp8_recipe}: upstream takes one of them; set FP8=0"
            " or FP4=0"
        )
        return
    if (experiment.precision == "fp4") != (recipe is not None):
        yield (
            f"precision {experiment.precision}, fp4_recipe {recipe}: fp4, and nothing else, needs a"
            " recipe: nvfp4"
        )
    if experiment.precision != "fp4":
        if "--fp4-param-gather" in experiment.extra_args:
            yield "ARGS: --fp4-param-gather is part of FP4=nvfp4; set that too, or leave it out"
        return
    if card and card.fp4_tflops is None:
        yield f"FP4={recipe}: {without_nvfp4(card)}"
    if experiment.tp_overlap:
        # fill_userbuffers_buffer_for_all_gather in transformer_engine/pytorch/module/base.py
        yield (
            f"FP4={recipe}: Transformer Engine's userbuffers send no NVFP4; set TP_OVERLAP=0, or"
            " FP8=tensorwise in its place"
        )
    if experiment.ep_overlap:
        # get_fp8_context in megatron/core/models/common/model_chunk_schedule_plan.py
        yield (
            f"FP4={recipe}: with EP_OVERLAP=1 upstream computes layers in bf16 all the same; set"
            " EP_OVERLAP=0, or FP8=mxfp8 in its place"
        )
    yield from _multiplied_in_blocks(experiment)


def _multiplied_in_blocks(experiment: Experiment) -> Iterator[str]:
    """Whether what quantised products sum over fills their blocks.

    The last dimension of an fp8 operand must be a multiple of 16 (assert_dim_for_fp8_exec in
    transformer_engine/pytorch/utils.py), of an fp4 operand one of 32 (get_fp4_align_size in
    megatron/core/fp4_utils.py): for weights' gradients the tokens. Blockwise, 128 values share a
    scale, in mxfp8 32, in nvfp4 16: those of a rank, before sequence parallelism gathers them
    (NVFP4Quantizer.is_quantizable).
    """
    recipe, precision, model = experiment.recipe, experiment.precision, experiment.model
    block = 32 if recipe in ("mxfp8", "nvfp4") else 16
    splits = experiment.tp if experiment.sequence_parallel else 1
    step = {"blockwise": 128, "nvfp4": 16 if splits > 1 else 32}.get(recipe, block)
    tokens = experiment.micro_batch_size * experiment.seq_length // experiment.cp // splits
    formula = "MBS x SEQ / CP" + (" / TP" if experiment.sequence_parallel else "")
    if tokens % step:
        yield (
            f"{precision} {recipe} multiplies in blocks of {step}: the tokens of a rank, {formula}"
            f" ({tokens}), must be divisible by {step}"
        )
    widths = {"hidden_size": model.hidden_size} | _split_widths(model, experiment.tp)
    if model.num_experts:
        widths["moe_ffn_hidden_size / ETP"] = model.moe_ffn // experiment.etp
    if odd := [f"{name} ({width})" for name, width in widths.items() if width % block]:
        yield (
            f"{precision} multiplies in blocks of {block}: {', '.join(odd)} must be divisible by"
            f" {block}"
        )


def _split_widths(model: Model, tp: int) -> dict[str, int]:
    """The widths inside of attention, MLP and shared expert on a rank, with their names."""
    widths = {
        "queries, keys and values / TP": model.qkv_size // tp,
        "queries / TP": model.context_size // tp,
    }
    if model.latent_attention:
        layers = of_attention(model).items()
        widths = {
            name: linear.outputs // (tp if linear.split == "outputs" else 1)
            for name, linear in layers
        }
        widths["values / TP"] = model.context_size // tp
    if model.mamba:
        # upstream's rule in MambaMixer, of each rank's part
        widths["mamba projected_size / TP"] = model.mamba.projected_size // tp
        widths["mamba inner_size / TP"] = model.mamba.inner_size // tp
    if model.dense_layers:
        widths["ffn_hidden_size / TP"] = model.ffn // tp
    if shared := model.moe_shared_expert_intermediate_size:
        widths["moe_shared_expert_intermediate_size / TP"] = shared // tp
    return widths


def _precision(experiment: Experiment) -> Iterator[str]:
    if experiment.optimizer_state == "bf16" and (
        experiment.sharding != "optim"
        or experiment.optimizer != "adam"
        or experiment.precision == "fp32"
    ):
        yield (
            "OPTIMIZER_STATE=bf16 is for Adam with SHARDING=optim and bf16 weights, not for"
            f" {experiment.optimizer} with {experiment.sharding} in {experiment.precision}"
        )
    yield from _offload(experiment)
    if experiment.deterministic and experiment.cross_entropy_fusion:
        yield "DETERMINISTIC=1: the fused loss may differ; set CROSS_ENTROPY_FUSION=0"
    if experiment.deterministic and experiment.tp_overlap:
        yield "DETERMINISTIC=1: sums of userbuffers may differ; set TP_OVERLAP=0"
    if experiment.gradients == "bf16" and experiment.precision == "fp32":
        yield "GRADIENTS=bf16 is for bf16 weights, not for fp32"
    if experiment.gradients == "bf16" and experiment.fully_sharded:
        yield f"GRADIENTS=bf16: {experiment.sharding} keeps them in bf16 anyway; leave it out"
    if experiment.cross_entropy_fusion_impl == "te" and not experiment.cross_entropy_fusion:
        yield "CROSS_ENTROPY_IMPL=te is a fused loss; set CROSS_ENTROPY_FUSION=1"
    if experiment.gradient_fusion and experiment.fully_sharded:
        yield (
            f"GRAD_FUSION=1: {experiment.sharding} has no buffer of gradients that products could"
            " add to; set GRAD_FUSION=0, or SHARDING=optim or no_shard"
        )
    if experiment.gradient_fusion and experiment.lora:
        yield "GRAD_FUSION=1: frozen weights have no gradients; leave it out with LoRA"
    yield from _recomputed_modules(experiment)
    if experiment.recompute_modules and experiment.recompute != "selective":
        yield (
            f"recompute_modules {', '.join(experiment.recompute_modules)} needs"
            f" RECOMPUTE=selective, not {experiment.recompute}"
        )


def _recomputed_modules(experiment: Experiment) -> Iterator[str]:
    model, modules = experiment.model, {*experiment.recompute_modules}
    if unknown := sorted(modules - {*RECOMPUTABLE}):
        yield f"recompute_modules {', '.join(unknown)}: valid are {', '.join(RECOMPUTABLE)}"
    if (named := sorted(modules & {"moe_act", "moe", "shared_experts"})) and not model.num_experts:
        yield f"RECOMPUTE_MODULES={','.join(named)}: {model.name} has no experts; leave it out"
    if "mla_up_proj" in modules and not model.latent_attention:
        yield f"RECOMPUTE_MODULES=mla_up_proj: {model.name} has no latent attention; leave it out"


def _sharding(experiment: Experiment) -> Iterator[str]:
    sharding, optimizer, model = experiment.sharding, experiment.optimizer, experiment.model
    if sharding == "torch_fsdp2" and (experiment.pp > 1 or experiment.ep > 1):
        yield (
            f"torch FSDP2 works with neither pipeline nor expert parallelism (PP={experiment.pp},"
            f" EP={experiment.ep})"
        )
    yield from _instances(experiment)
    if not experiment.overlap and experiment.fully_sharded:
        yield f"OVERLAP=0: {sharding} works by overlap; set OVERLAP=1, or SHARDING=optim"
    if experiment.fully_sharded and optimizer != "adam":
        yield f"upstream's {optimizer} works with SHARDING=no_shard or optim, not {sharding}"
    biased_experts = model.num_experts and model.add_bias_linear
    if optimizer == "muon" and sharding == "optim" and biased_experts:
        yield "upstream's sharded muon does not take experts with biases; set SHARDING=no_shard"


def _offload(experiment: Experiment) -> Iterator[str]:
    """Of upstream's HybridDeviceOptimizer (megatron/core/optimizer/cpu_offloading)."""
    offload, sharding = experiment.offload, experiment.sharding
    if not offload:
        return
    if sharding != "optim" or experiment.optimizer != "adam" or experiment.precision == "fp32":
        yield (
            f"OFFLOAD={offload:g} is for Adam with SHARDING=optim and bf16 weights, not for"
            f" {experiment.optimizer} with {sharding} in {experiment.precision}"
        )
    if experiment.optimizer_state != "fp32":
        yield (
            f"OFFLOAD={offload:g}: the host keeps moments in fp32; leave out"
            f" OPTIMIZER_STATE={experiment.optimizer_state}"
        )
    if experiment.fp8_params and experiment.fp8_recipe != "delayed":
        yield (
            f"OFFLOAD={offload:g} with FP8_PARAMS=1 needs FP8=delayed, not {experiment.fp8_recipe}"
        )


def _instances(experiment: Experiment) -> Iterator[str]:
    instances, replicas = experiment.optimizer_instances, experiment.replicas
    if instances == 1:
        return
    if experiment.sharding in ("no_shard", "torch_fsdp2") or experiment.optimizer != "adam":
        yield (
            f"OPTIM_INSTANCES={instances} is for Adam with SHARDING=optim or Megatron-FSDP, not for"
            f" {experiment.optimizer} with {experiment.sharding}"
        )
    if broken := indivisible("DP x CP", replicas, "OPTIM_INSTANCES", instances):
        yield f"{broken}; {_try('OPTIM_INSTANCES', divisors(replicas), instances)}"
    elif experiment.model.num_experts and experiment.expert_replicas % instances:
        yield (
            f"ranks with the same experts ({experiment.expert_replicas}) must be divisible by"
            f" OPTIM_INSTANCES ({instances})"
        )


def _cuda_graphs(experiment: Experiment) -> Iterator[str]:
    """Rules of TransformerConfig.__post_init__ in megatron/core/transformer, and of what it runs.

    A layer with experts is captured by Transformer Engine: upstream's own graphs capture the whole
    of a GPT's layer (``TransformerLayer.create_mcore_cudagraph_manager``).
    """
    if not experiment.cuda_graphs:
        return
    yield from _graphed_modules(experiment)
    if experiment.recompute == "full":
        yield "a CUDA graph of a layer cannot be recomputed; set RECOMPUTE=none or selective"
    recomputed, graphed = experiment.selectively_recomputed, experiment.graphed
    if "core_attn" in recomputed and "attn" in graphed and experiment.model.dropout:
        yield (
            "CUDA graphs cannot repeat the dropout of recomputed attention; set DROPOUT=0 or"
            " RECOMPUTE=none"
        )
    if experiment.fully_sharded:
        yield (
            f"CUDA graphs do not run the hooks by which {experiment.sharding} gathers weights; set"
            " SHARDING=optim or no_shard"
        )


def _graphed_modules(experiment: Experiment) -> Iterator[str]:
    graphed, model = experiment.graphed, experiment.model
    said = f"CUDA_GRAPHS={','.join(graphed)}"
    if routed := [name for name in graphed if name.startswith("moe_")]:
        if not model.num_experts:
            yield f"{said}: {model.name} has no experts; leave {', '.join(routed)} out"
        elif "moe_router" not in graphed:
            yield f"{said}: moe_preprocess needs moe_router beside it"
        if "moe" in experiment.selectively_recomputed:
            yield f"{said}: recomputed experts cover the graph of the router; leave it out"
    if "moe_preprocess" in graphed and experiment.moe_capacity:
        yield f"{said}: with MOE_CAPACITY counts go to the CPU there; leave moe_preprocess out"
    if "mlp" in graphed and model.num_experts and (not model.dense_layers or experiment.ep_overlap):
        yield f"{said}: experts cannot be captured; leave mlp out"
    if "mlp" in experiment.selectively_recomputed and "mlp" in graphed and model.dropout:
        yield f"{said}: the dropout of a recomputed MLP cannot be captured; set DROPOUT=0"


def _lora(experiment: Experiment) -> Iterator[str]:
    if experiment.lora is None:
        return
    on_experts = sorted({"linear_fc1", "linear_fc2"} & set(experiment.lora.targets))
    if experiment.model.num_experts and on_experts:
        yield (
            f"LoRA: experts get no adapters, but {', '.join(on_experts)} of"
            f" {experiment.model.name} belong to experts; set LORA_TARGETS=linear_qkv,linear_proj"
        )
    if experiment.fully_sharded:
        yield (
            f"LoRA: {experiment.sharding} shards trained weights, not frozen ones; set"
            " SHARDING=optim or no_shard"
        )
    if experiment.optimizer != "adam":
        yield (
            f"LoRA: {experiment.optimizer} is for whole matrices, not for low-rank factors; set"
            " OPTIMIZER=adam"
        )
    if experiment.quantised:
        yield f"LoRA: {experiment.precision} is not tested with adapters; choose a bf16 row"
    if experiment.cuda_graphs:
        yield "LoRA: CUDA graphs are not tested with adapters; set CUDA_GRAPHS=0"


def _traced_steps(experiment: Experiment) -> Iterator[str]:
    steps = experiment.steps
    if not experiment.profile or 2 <= experiment.profile[0] <= experiment.profile[1] <= steps:
        return
    first, last = experiment.profile
    ways_out = [f"PROFILE={max(steps - 1, 2)}-{steps}"] * (steps >= 2)
    ways_out += [f"STEPS={max(first, last)}"] * (max(first, last) > max(steps, 1))
    if 2 <= last < first <= steps:
        ways_out = [f"PROFILE={last}-{first}"]
    yield (
        f"PROFILE={first}-{last} traces from step {first} to step {last}, which must be 2 or later,"
        f" in order, and among the {steps} steps of the run; try"
        f" {', or '.join(ways_out) or 'STEPS=2 PROFILE=2-2'}"
    )


RULES = (
    _learning_rate,
    _widths,
    _stages,
    _batch,
    _sequence,
    _experts,
    _nodes,
    _architecture,
    architecture.violations,
    _fp8,
    _fp4,
    _precision,
    _sharding,
    _cuda_graphs,
    _lora,
    _entry,
    _traced_steps,
)
"""Each complains of an experiment that breaks it, and reads few of its fields."""
