"""What must divide what: the arithmetic between a model, its parallel sizes and its batch.

Each rule states the formula with the values at hand and a way out, so that nothing is truncated
silently and nothing fails minutes later inside upstream. Sources: ``validate_args`` in
megatron/training/arguments.py, ``__post_init__`` in
megatron/core/transformer/transformer_config.py, megatron/core/parallel_state.py and
megatron/core/pipeline_parallel/schedules.py of core_v0.19.0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from harness.errors import UserError
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import find_card
from harness.system import yaml_files


def checked(fields: Mapping[str, Any], where: str) -> Experiment:
    """The experiment of ``fields``.

    Raises:
        UserError: a field is wrong or a rule is broken; a line for each, after ``where``.
    """
    experiment = yaml_files.build(Experiment, fields, where)
    if broken := violations(experiment):
        raise UserError("\n".join(f"{where}: {sentence}" for sentence in broken))
    return experiment


def with_changes(experiment: Experiment, **changes: Any) -> Experiment:
    """A copy of ``experiment`` with ``changes`` (field names). Raises UserError as ``checked``."""
    fields = {name: getattr(experiment, name) for name in Experiment.model_fields}
    return checked({**fields, **changes}, experiment.id)


def violations(experiment: Experiment) -> list[str]:
    """Return one sentence per rule that ``experiment`` breaks; an empty list where it can run."""
    return list(_violations(experiment))


def _violations(e: Experiment) -> Iterator[str]:
    if e.lowest_lr > e.highest_lr:
        yield f"min_lr {e.lowest_lr:g} must not be above lr {e.highest_lr:g}"
    if (e.lr_warmup_steps or 0) >= e.lr_decay_steps:
        yield (
            f"lr_warmup_steps {e.lr_warmup_steps} must be below the {e.lr_decay_steps} steps in"
            " which the rate decays"
        )
    yield from _width_violations(e)
    yield from _schedule_violations(e)
    yield from _sequence_violations(e)
    yield from _expert_violations(e)
    if e.world_size % e.nodes:
        yield (
            f"{e.world_size} GPUs (tp x pp x cp x dp = {e.tp} x {e.pp} x {e.cp} x {e.dp}) must"
            f" divide by {e.nodes} nodes; {_try('nodes', divisors(e.world_size), e.nodes)}"
        )
    yield from _model_violations(e)
    yield from _precision_violations(e)
    yield from _sharding_violations(e)
    yield from _cuda_graph_violations(e)
    yield from _lora_violations(e)
    if e.profile and not 2 <= e.profile[0] <= e.profile[1] <= e.steps:
        first, last = e.profile
        ways_out = [f"PROFILE={max(e.steps - 1, 2)}-{e.steps}"] * (e.steps >= 2)
        ways_out += [f"STEPS={max(first, last)}"] * (max(first, last) > max(e.steps, 1))
        if 2 <= last < first <= e.steps:
            ways_out = [f"PROFILE={last}-{first}"]
        yield (
            f"PROFILE={first}-{last} traces from step {first} to step {last}, which must be 2 or"
            f" later, in order, and among the {e.steps} steps of the run; try"
            f" {', or '.join(ways_out) or 'STEPS=2 PROFILE=2-2'}"
        )


def _width_violations(e: Experiment) -> Iterator[str]:
    m, heads = e.model, e.model.num_attention_heads
    if not m.kv_channels and m.hidden_size % heads:
        yield f"hidden_size {m.hidden_size} must divide by num_attention_heads {heads}"
    if heads % e.tp:
        yield (
            f"num_attention_heads {heads} must divide by tp = {e.tp};"
            f" {_try('tp', divisors(heads), e.tp)}"
        )
    elif m.ffn % e.tp:
        yield (
            f"ffn_hidden_size {m.ffn} must divide by tp = {e.tp};"
            f" {_try('tp', divisors(math.gcd(heads, m.ffn)), e.tp)}"
        )
    if m.num_query_groups and heads % m.num_query_groups:
        yield f"num_attention_heads {heads} must divide by num_query_groups {m.num_query_groups}"
    if m.num_query_groups and m.num_query_groups % e.tp and e.tp % m.num_query_groups:
        yield f"num_query_groups {m.num_query_groups} and tp = {e.tp} must divide one by the other"


def _schedule_violations(e: Experiment) -> Iterator[str]:
    layers = e.model.num_layers
    if layers % (e.pp * e.vpp):
        if e.vpp > 1 and layers % e.pp == 0:
            way_out = _try("vpp", divisors(layers // e.pp), e.vpp)
        else:
            way_out = _try("pp", divisors(layers // e.vpp) if layers % e.vpp == 0 else (), e.pp)
        yield (
            f"layers {layers} must divide by pp x vpp = {e.pp} x {e.vpp} = {e.pp * e.vpp};"
            f" {way_out}"
        )
    if e.vpp > 1 and e.pp == 1:
        yield f"vpp = {e.vpp} interleaves pipeline stages, but pp = 1; set pp > 1 or vpp = 1"
    if e.global_batch_size % (e.micro_batch_size * e.dp):
        per_rank, rest = divmod(e.global_batch_size, e.dp)
        way_out = (
            f"{_try('mbs', divisors(per_rank), e.micro_batch_size)}, or gbs a multiple of "
            f"{e.micro_batch_size * e.dp}"
            if not rest and per_rank
            else f"set gbs to a multiple of {e.micro_batch_size * e.dp}"
        )
        yield (
            f"gbs {e.global_batch_size} must divide by mbs x dp = {e.micro_batch_size} x {e.dp} = "
            f"{e.micro_batch_size * e.dp}; {way_out}"
        )
    elif e.vpp > 1 and e.pp > 1 and e.num_microbatches % e.pp:
        yield (
            f"micro-batches m = gbs / (mbs x dp) = {e.num_microbatches} must divide by pp = {e.pp}"
            f" when vpp > 1; set gbs to a multiple of {e.micro_batch_size * e.dp * e.pp}, or"
            " vpp = 1"
        )


def _sequence_violations(e: Experiment) -> Iterator[str]:
    m, heads = e.model, e.model.num_attention_heads
    if e.cp > 1 and e.seq_length % (2 * e.cp):
        yield (
            f"seq {e.seq_length} must divide by 2 x cp = {2 * e.cp} (each rank holds two chunks); "
            f"{_try('cp', [cp for cp in range(1, 65) if e.seq_length % (2 * cp) == 0], e.cp)}"
        )
    if e.positions and m.position_embedding == "learned_absolute" and e.seq_length > e.positions:
        yield (
            f"seq {e.seq_length}: positions were learned up to {e.positions}; set SEQ={e.positions}"
            " or less"
        )
    if e.cp > 1 and e.cp_comm_type == "a2a" and heads % (e.tp * e.cp):
        yield (
            f"a2a shares heads out over cp: num_attention_heads {heads} must divide by tp x cp ="
            f" {e.tp} x {e.cp}; {_try('cp', divisors(max(heads // e.tp, 1)), e.cp)}, or"
            " cp_comm_type p2p"
        )
    elif e.cp > 1 and e.cp_comm_type == "a2a" and m.key_heads % (e.tp * e.cp):
        yield (
            f"a2a shares heads out over cp: num_query_groups {m.num_query_groups} must divide by tp"
            f" x cp = {e.tp} x {e.cp};"
            f" {_try('cp', divisors(max(m.num_query_groups // e.tp, 1)), e.cp)}, or"
            " cp_comm_type p2p"
        )
    if e.sequence_parallel and e.tp == 1:
        yield "sp splits activations over tp, but tp = 1; set tp > 1 or sp: false"
    if e.sequence_parallel and e.seq_length // e.cp % e.tp:
        yield (
            f"seq / cp = {e.seq_length} / {e.cp} must divide by tp = {e.tp} for sequence"
            " parallelism"
        )


def _model_violations(e: Experiment) -> Iterator[str]:
    m = e.model
    if (m.position_embedding == "yarn") != (m.yarn is not None):
        yield (
            f"position_embedding {m.position_embedding}, yarn {'given' if m.yarn else 'missing'}:"
            " set both or neither"
        )
    if m.position_embedding != "learned_absolute" and m.head_size % 2:
        yield f"rotary positions turn pairs: the head size {m.head_size} must be even"
    if m.qk_norm == "projection" and m.normalization != "RMSNorm":
        yield "qk_norm projection is an RMS norm; set normalization: RMSNorm"
    if m.qk_norm == "projection" and m.key_heads % e.tp:
        yield f"qk_norm projection: {m.key_heads} key heads must divide by tp = {e.tp}"
    if e.cp > 1 and (m.window_size or m.attention_sinks) and e.cp_comm_type != "a2a":
        yield (
            "windows and sinks need context parallelism by all-to-all: set cp_comm_type a2a, not"
            f" {e.cp_comm_type}"
        )


def _lora_violations(e: Experiment) -> Iterator[str]:
    if e.lora is None:
        return
    experts = (
        sorted({"linear_fc1", "linear_fc2"} & set(e.lora.targets)) if e.model.num_experts else []
    )
    if experts:
        yield (
            f"LoRA: experts get no adapters, but {', '.join(experts)} of {e.model.name} are theirs;"
            " set LORA_TARGETS=linear_qkv,linear_proj"
        )
    if e.fully_sharded:
        yield (
            f"LoRA: sharding {e.sharding} is for weights that are trained; set SHARDING=optim or"
            " no_shard"
        )
    if e.optimizer != "adam":
        yield (
            f"LoRA: {e.optimizer} is for whole matrices, not for their factors; set OPTIMIZER=adam"
        )
    if e.precision == "fp8":
        yield "LoRA: fp8 is not tested with adapters; choose a bf16 row"
    if e.cuda_graphs:
        yield "LoRA: CUDA graphs are not tested with adapters; set CUDA_GRAPHS=0"


def _precision_violations(e: Experiment) -> Iterator[str]:
    if (e.precision == "fp8") != (e.fp8_recipe is not None):
        yield (
            f"precision {e.precision}, fp8_recipe {e.fp8_recipe}: fp8, and nothing else, needs a"
            " recipe: delayed, tensorwise or blockwise"
        )
    if e.precision == "fp8" and e.card and (gpu := find_card(e.card)) and gpu.fp8_tflops is None:
        yield (
            f"precision fp8: {gpu.name} has none (Ada, Hopper and later do); leave CARD= out, or"
            " choose a bf16 row"
        )
    tokens = e.micro_batch_size * e.seq_length // e.cp // (e.tp if e.sequence_parallel else 1)
    step = 128 if e.fp8_recipe == "blockwise" else 16
    if e.precision == "fp8" and tokens % step:
        yield (
            f"fp8 {e.fp8_recipe} multiplies in blocks of {step}: the tokens of a rank, mbs x seq /"
            f" cp{' / tp' if e.sequence_parallel else ''} = {tokens}, must divide by {step}"
        )
    odd = [f"{name} = {width}" for name, width in _widths(e).items() if width % 16]
    if e.precision == "fp8" and odd:
        yield f"fp8 multiplies in blocks of 16, by which {', '.join(odd)} must divide"
    if e.optimizer_state == "bf16" and (
        e.sharding != "optim" or e.optimizer != "adam" or e.precision == "fp32"
    ):
        yield (
            "optimizer_state bf16 is for Adam with sharding optim and weights in bf16, not for"
            f" {e.optimizer} with {e.sharding} in {e.precision}"
        )
    if e.gradients == "bf16" and e.optimizer_state != "bf16":
        yield "gradients bf16 need upstream's precision-aware optimizer; set optimizer_state: bf16"
    discarded = sorted({"layernorm", "moe_act"} & set(e.recompute_modules))
    if e.fp8_recipe == "delayed" and discarded:
        yield (
            f"fp8 delayed cannot recompute {', '.join(discarded)}, whose outputs are discarded; "
            "set fp8_recipe tensorwise or blockwise"
        )
    if e.recompute_modules and e.recompute != "selective":
        yield (
            f"recompute_modules {', '.join(e.recompute_modules)} needs recompute: selective, not"
            f" {e.recompute}"
        )


def _widths(e: Experiment) -> dict[str, int]:
    """Inputs and outputs of the linear layers on a rank."""
    m = e.model
    widths = {
        "hidden_size": m.hidden_size,
        "queries, keys and values / tp": m.qkv_size // e.tp,
        "queries / tp": m.query_size // e.tp,
    }
    mlp = (
        {"moe_ffn_hidden_size / etp": m.moe_ffn // e.etp}
        if m.num_experts
        else {"ffn_hidden_size / tp": m.ffn // e.tp}
    )
    return widths | mlp


def _sharding_violations(e: Experiment) -> Iterator[str]:
    if e.sharding == "torch_fsdp2" and (e.pp > 1 or e.ep > 1):
        yield (
            f"torch FSDP2 works with neither pipeline nor expert parallelism (pp = {e.pp}, ep ="
            f" {e.ep})"
        )
    if e.fully_sharded and e.optimizer != "adam":
        yield f"upstream's {e.optimizer} works with sharding no_shard or optim, not {e.sharding}"
    if (
        e.optimizer == "muon"
        and e.model.num_experts
        and e.model.add_bias_linear
        and e.sharding == "optim"
    ):
        yield (
            "upstream's sharded muon does not take experts with biases yet; set sharding: no_shard"
        )


def _cuda_graph_violations(e: Experiment) -> Iterator[str]:
    if not e.cuda_graphs:
        return
    if e.recompute == "full":
        yield "CUDA graphs of layers cannot be recomputed whole; set RECOMPUTE=none or selective"
    if "core_attn" in e.selectively_recomputed and e.model.dropout:
        yield (
            "CUDA graphs cannot draw the dropout of recomputed attention again; set DROPOUT=0 or"
            " RECOMPUTE=none"
        )
    if e.fully_sharded:
        yield (
            f"CUDA graphs do not know the hooks by which {e.sharding} gathers weights; set"
            " SHARDING=optim or no_shard"
        )


def _expert_violations(e: Experiment) -> Iterator[str]:
    m = e.model
    if m.num_experts is None:
        if e.ep > 1 or e.etp > 1:
            yield (
                f"ep = {e.ep}, etp = {e.etp} share out experts, but model {m.name} has none; set ep"
                " = etp = 1"
            )
        return
    if m.num_experts % e.ep:
        yield (
            f"experts {m.num_experts} must divide by ep = {e.ep};"
            f" {_try('ep', divisors(m.num_experts), e.ep)}"
        )
    if m.moe_ffn % e.etp:
        yield f"moe_ffn_hidden_size {m.moe_ffn} must divide by etp = {e.etp}"
    if m.add_bias_linear and e.etp > 1:
        yield (
            f"etp = {e.etp} splits experts, which upstream does for experts without biases only;"
            " set etp = 1"
        )
    if m.moe_router_topk > m.num_experts:
        yield (
            f"moe_router_topk {m.moe_router_topk} is more than the {m.num_experts} experts"
            " there are"
        )
    stage = e.world_size // e.pp
    if stage % (e.ep * e.etp):
        fits = [ep for ep in divisors(math.gcd(stage, m.num_experts)) if stage % (ep * e.etp) == 0]
        yield (
            f"the {stage} ranks of a pipeline stage (tp x cp x dp = {e.tp} x {e.cp} x {e.dp}) must"
            f" divide by ep x etp = {e.ep} x {e.etp} = {e.ep * e.etp}; {_try('ep', fits, e.ep)}"
        )
    if e.tp > 1 and not e.sequence_parallel:
        yield f"experts with tp = {e.tp} need sequence parallelism; set sp: true (SP=1)"


def divisors(n: int) -> list[int]:
    """Every whole number that divides ``n``, in order."""
    low = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return [*low, *(n // k for k in reversed(low) if k * k != n)]


def _try(name: str, choices: Iterable[int], wanted: int, most: int = 8) -> str:
    """The valid choices, those nearest to what was wanted."""
    near = sorted(sorted(choices, key=lambda k: abs(k - wanted))[:most])
    return f"try {name} in {{{', '.join(map(str, near))}}}" if near else f"no {name} fits"
