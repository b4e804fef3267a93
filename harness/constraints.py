"""What must divide what: the arithmetic between a model, its parallel sizes and its batch.

Each rule states the formula with the values at hand and a way out, so that nothing is truncated silently and nothing
fails minutes later inside upstream. Sources: ``validate_args`` in megatron/training/arguments.py, ``__post_init__`` in
megatron/core/transformer/transformer_config.py, megatron/core/parallel_state.py and
megatron/core/pipeline_parallel/schedules.py of core_v0.19.0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.catalog import Experiment


def violations(experiment: Experiment) -> list[str]:
    """Return one sentence per rule that ``experiment`` breaks; an empty list where it can run."""
    return list(_violations(experiment))


def _violations(e: Experiment) -> Iterator[str]:
    m = e.model
    heads, layers, ranks = m.num_attention_heads, m.num_layers, e.tp * e.pp * e.cp * e.dp

    if m.hidden_size % heads:
        yield f"hidden_size {m.hidden_size} must divide by num_attention_heads {heads}"
    if heads % e.tp:
        yield f"num_attention_heads {heads} must divide by tp = {e.tp}; {_try('tp', _divisors(heads), e.tp)}"
    elif m.ffn % e.tp:
        yield f"ffn_hidden_size {m.ffn} must divide by tp = {e.tp}; {_try('tp', _divisors(m.ffn), e.tp)}"
    if m.num_query_groups and m.num_query_groups % e.tp and e.tp % m.num_query_groups:
        yield f"num_query_groups {m.num_query_groups} and tp = {e.tp} must divide one by the other"

    if layers % (e.pp * e.vpp):
        if e.vpp > 1 and layers % e.pp == 0:
            way_out = _try("vpp", _divisors(layers // e.pp), e.vpp)
        else:
            way_out = _try("pp", _where(lambda pp: layers % (pp * e.vpp) == 0, layers), e.pp)
        yield f"layers {layers} must divide by pp x vpp = {e.pp} x {e.vpp} = {e.pp * e.vpp}; {way_out}"
    if e.vpp > 1 and e.pp == 1:
        yield f"vpp = {e.vpp} interleaves pipeline stages, but pp = 1; set pp > 1 or vpp = 1"

    if e.global_batch_size % (e.micro_batch_size * e.dp):
        per_rank, rest = divmod(e.global_batch_size, e.dp)
        way_out = (f"{_try('mbs', _divisors(per_rank), e.micro_batch_size)}, or gbs a multiple of "
                   f"{e.micro_batch_size * e.dp}" if not rest and per_rank
                   else f"set gbs to a multiple of {e.micro_batch_size * e.dp}")
        yield (f"gbs {e.global_batch_size} must divide by mbs x dp = {e.micro_batch_size} x {e.dp} = "
               f"{e.micro_batch_size * e.dp}; {way_out}")
    elif e.vpp > 1 and e.pp > 1 and e.num_microbatches % e.pp:
        yield (f"micro-batches m = gbs / (mbs x dp) = {e.num_microbatches} must divide by pp = {e.pp} when vpp > 1; "
               f"set gbs to a multiple of {e.micro_batch_size * e.dp * e.pp}, or vpp = 1")

    if e.cp > 1 and e.seq_length % (2 * e.cp):
        yield (f"seq {e.seq_length} must divide by 2 x cp = {2 * e.cp} (each rank holds two chunks); "
               f"{_try('cp', _where(lambda cp: e.seq_length % (2 * cp) == 0, 64), e.cp)}")
    if e.cp > 1 and e.cp_comm_type == "a2a" and heads % (e.tp * e.cp):
        yield (f"a2a shares heads out over cp: num_attention_heads {heads} must divide by tp x cp = {e.tp} x {e.cp}; "
               f"{_try('cp', _divisors(max(heads // e.tp, 1)), e.cp)}, or cp_comm_type p2p")
    if e.sequence_parallel and e.tp == 1:
        yield "sp splits activations over tp, but tp = 1; set tp > 1 or sp: false"
    if e.sequence_parallel and e.seq_length // e.cp % e.tp:
        yield f"seq / cp = {e.seq_length} / {e.cp} must divide by tp = {e.tp} for sequence parallelism"

    yield from _expert_violations(e, ranks)

    if ranks % e.nodes:
        yield (f"{ranks} GPUs (tp x pp x cp x dp = {e.tp} x {e.pp} x {e.cp} x {e.dp}) must divide by {e.nodes} nodes; "
               f"{_try('nodes', _divisors(ranks), e.nodes)}")
    if e.sharding == "torch_fsdp2" and (e.pp > 1 or e.ep > 1):
        yield f"torch FSDP2 works with neither pipeline nor expert parallelism (pp = {e.pp}, ep = {e.ep})"
    if e.profile and not 2 <= e.profile[0] <= e.profile[1] <= e.steps:
        first, last = e.profile
        yield (f"PROFILE={first}-{last}: a trace goes from one step to a later one, between 2 and the last step, {e.steps}; "
               f"try PROFILE={max(e.steps - 1, 2)}-{max(e.steps, 2)}, or STEPS={max(first, last)}")


def _expert_violations(e: Experiment, ranks: int) -> Iterator[str]:
    m = e.model
    if m.num_experts is None:
        if e.ep > 1 or e.etp > 1:
            yield f"ep = {e.ep}, etp = {e.etp} share out experts, but model {m.name} has none; set ep = etp = 1"
        return
    if m.num_experts % e.ep:
        yield f"experts {m.num_experts} must divide by ep = {e.ep}; {_try('ep', _divisors(m.num_experts), e.ep)}"
    if m.moe_ffn % e.etp:
        yield f"moe_ffn_hidden_size {m.moe_ffn} must divide by etp = {e.etp}"
    if m.moe_router_topk > m.num_experts:
        yield f"moe_router_topk {m.moe_router_topk} is more than the {m.num_experts} experts there are"
    stage = ranks // e.pp
    if stage % (e.ep * e.etp):
        fits = _where(lambda ep: stage % (ep * e.etp) == 0 and m.num_experts % ep == 0, stage)
        yield (f"the {stage} ranks of a pipeline stage (tp x cp x dp = {e.tp} x {e.cp} x {e.dp}) must divide by "
               f"ep x etp = {e.ep} x {e.etp} = {e.ep * e.etp}; {_try('ep', fits, e.ep)}")
    if e.tp > 1 and e.ep > 1 and not e.sequence_parallel:
        yield f"expert parallelism with tp = {e.tp} needs sequence parallelism; set sp: true (SP=1)"


def _divisors(n: int) -> list[int]:
    return _where(lambda k: n % k == 0, n)


def _where(valid: Callable[[int], bool], most: int) -> list[int]:
    return [k for k in range(1, most + 1) if valid(k)]


def _try(name: str, choices: Iterable[int], wanted: int, most: int = 8) -> str:
    """The valid choices, those nearest to what was wanted."""
    near = sorted(sorted(choices, key=lambda k: abs(k - wanted))[:most])
    return f"try {name} in {{{', '.join(map(str, near))}}}" if near else f"no {name} fits"
