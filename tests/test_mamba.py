"""Models with Mamba-2 layers: their pattern and sizes, upstream's layers on a CPU, and what predictions say of them."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from harness import RECORDS, generate
from harness.convert.arguments import model_of
from harness.doctor import mamba_kernels
from harness.errors import UserError
from harness.experiment.catalog import load_catalog, load_models
from harness.experiment.constraints import with_changes
from harness.experiment.hybrid import layer_pattern
from harness.experiment.model import CONV_WIDTH
from harness.experiment.unlisted import experiment_from
from harness.machine import requirements
from harness.machine.requirements import check_machine, mamba_kernels_lacking
from harness.planning import checked
from harness.planning.miniature import miniature, shortest_run
from harness.predict import calibrations, capacity, stages
from harness.predict.activations import layer_operations, mamba_bytes
from harness.predict.flops import count_parameters, parameters_on, step_flops, upstream_flops
from harness.predict.mamba_operations import channels
from harness.predict.memory import predict
from harness.predict.step_time import StepWork, kinds
from harness.upstreams.megatron_lm.flags import megatron_flags
from tests.miniature_runs import losses, run
from tests.one_process import answer

ROOT = Path(__file__).parents[1]
CATALOG = load_catalog()
ROW, SPLIT = CATALOG.find("681"), CATALOG.find("682")
NEMOTRON = load_models()["nemotron-h-8b"]


def changed(row=ROW, **fields):
    """``row`` with other fields of its model; of its Mamba layers, only those given."""
    if fields.get("mamba"):
        fields["mamba"] = row.model.mamba.model_copy(update=fields["mamba"])
    return with_changes(row, model=row.model.model_copy(update=fields))


# The model


def test_nemotron_h_8b_has_the_layers_that_its_report_says():
    """24 Mamba-2 layers, 24 MLPs and 4 of attention (arXiv:2504.03624, table 1)."""
    layers = stages.of_model(ROW)
    assert (layers.mamba, layers.mlp, layers.attention) == (24, 24, 4)
    assert (layers.total, layers.attending) == (52, 4)
    assert NEMOTRON.mamba.inner_size == 2 * NEMOTRON.hidden_size
    # in_proj of the released weights: 18,560 x 4,096
    assert NEMOTRON.mamba.projected_size == 18_560


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"layer_pattern": "MX-*", "num_layers": 4}, r"'X' is none of M \(Mamba\), \* \(attention\), - \(an MLP\)"),
        ({"layer_pattern": "M-|M*", "num_layers": 5}, r"'\|' is none of .*; PP and VPP divide it"),
        ({"num_layers": 51}, r"num_layers \(51\) must equal the letters of layer_pattern \(52\)"),
        ({"layer_pattern": "*-*-", "num_layers": 4}, "is of a model with Mamba layers, M"),
        ({"mamba": None}, "whose sizes mamba says: set both or neither"),
        ({"layer_pattern": None}, "mamba: layer_pattern says which layers they are"),
        ({"layer_pattern": "-M*-", "num_layers": 4}, "upstream's parser takes it for an option"),
        ({"num_experts": 8, "moe_router_topk": 2}, "layer_pattern is not tested with num_experts"),
    ],
)  # fmt: skip
def test_a_pattern_that_describes_no_such_model_is_refused(fields, complaint):
    with pytest.raises(UserError, match=complaint):
        changed(**fields)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tp": 16}, r"mamba num_groups \(8\) must be divisible by TP \(16\); each rank has whole"),
        ({"tp": 4, "cp": 64, "seq_length": 8192}, r"mamba num_heads \(128\) must be divisible by TP x CP \(4 x 64 = 256\)"),
        ({"entry": "gpt"}, "only upstream's HybridModel has Mamba layers; set ENTRY=hybrid"),
        ({"pp": 3}, r"layers \(52\) must be divisible by PP x VPP \(3 x 1 = 3\); try PP in"),
        ({"cuda_graphs": True}, "CUDA_GRAPHS=1; leave it out"),
        ({"pp": 2, "pp_layout": "Et*26|t*26L"}, "PP_LAYOUT; leave it out"),
        ({"sharding": "fsdp_optim", "optimizer_state": "fp32"}, "SHARDING=fsdp_optim; leave it out"),
        ({"optimizer": "muon", "optimizer_state": "fp32"}, "Mamba layers are not tested with OPTIMIZER=muon"),
        ({"tp": 2, "sequence_parallel": True, "tp_overlap": True}, "not tested with TP_OVERLAP=1"),
    ],
)  # fmt: skip
def test_what_mamba_layers_do_not_go_with_is_refused(changes, complaint):
    with pytest.raises(UserError, match=complaint):
        with_changes(ROW, **changes)


def test_sizes_of_mamba_layers_must_divide():
    with pytest.raises(
        UserError, match=r"mamba num_heads \(100\) must be divisible by mamba num_groups \(8\)"
    ):
        changed(mamba={"num_heads": 100})
    three = with_changes(changed(mamba={"num_groups": 4}), tp=2, seq_length=4096)
    with_changes(three, cp=2)
    with pytest.raises(UserError, match=r"mamba num_groups / TP \(3\) and CP \(2\)"):
        with_changes(changed(mamba={"num_groups": 6, "num_heads": 96}), tp=2, cp=2)
    odd = changed(SPLIT, mamba={"num_heads": 136})
    with pytest.raises(
        UserError, match=r"mamba projected_size / TP \(9796\) must be divisible by 16"
    ):
        with_changes(odd, precision="fp8", fp8_recipe="tensorwise")


def test_conversations_are_refused():
    with pytest.raises(
        UserError, match="681: conversations are packed, which is not tested with Mamba"
    ):
        checked._check_conversations(ROW)


def test_such_a_checkpoint_is_neither_exported_nor_generated_from(monkeypatch, tmp_path):
    saved = Namespace(num_layers=3, hybrid_layer_pattern="M*-")
    with pytest.raises(
        UserError, match=r"mine: models with Mamba layers \(M\*-\) are not converted"
    ):
        model_of(saved, "mine", 1024)
    asked = generate.Request(None, ROW, generate.Sampling("1 2"))
    monkeypatch.setattr(generate, "_of_run", lambda *_: asked)
    with pytest.raises(
        UserError, match="681: make generate runs GPTModel, which has no Mamba layers"
    ):
        generate.parse({"RUN": "681", "PROMPT": "1 2"}, tmp_path)


def test_layers_cuts_the_pattern():
    cut = experiment_from("nemotron-h-8b", {"LAYERS": "8"})
    assert (cut.model.layer_pattern, cut.entry) == ("M-M-M-M*", "hybrid")
    assert stages.of_model(cut) == stages.Layers(mamba=4, mlp=3, attention=1)


# What upstream is told


@pytest.mark.parametrize(
    ("changes", "segments"),
    [
        ({}, [NEMOTRON.layer_pattern]),
        ({"pp": 2}, [NEMOTRON.layer_pattern[:26], NEMOTRON.layer_pattern[26:]]),
        ({"pp": 2, "vpp": 2}, [NEMOTRON.layer_pattern[at : at + 13] for at in (0, 13, 26, 39)]),
        ({"pp": 2, "first_stage_layers": 20}, [NEMOTRON.layer_pattern[:20], NEMOTRON.layer_pattern[20:]]),
    ],
)  # fmt: skip
def test_the_pattern_has_a_segment_for_each_chunk(changes, segments):
    row = with_changes(ROW, **changes)
    assert layer_pattern(row) == "|".join(segments)
    words = [word for group in megatron_flags(row, "cuda") for word in group]
    assert words[words.index("--hybrid-layer-pattern") + 1] == "|".join(segments)
    said = " ".join(words)
    for part in ("--mamba-num-heads 128 --mamba-head-dim 64", "--mamba-state-dim 128 --mamba-num-groups 8",
                 "--position-embedding-type none", "--squared-relu", "--spec harness.specs.hybrid stack_spec"):  # fmt: skip
        assert part in said
    assert "--num-layers" not in words and "--rotary-base" not in words


def test_chunks_hold_the_layers_of_their_segment():
    row = with_changes(ROW, pp=2, vpp=2)
    held = [chunk for stage in stages.all_chunks(row) for chunk in stage]
    segments = [layer_pattern(row).split("|")[at] for at in (0, 2, 1, 3)]
    assert held == [
        stages.Layers(mamba=one.count("M"), attention=one.count("*"), mlp=one.count("-"))
        for one in segments
    ]
    assert sum(parameters_on(row, stage).dense for stage in (0, 1)) == count_parameters(ROW).total


# Packages on a GPU


def test_missing_kernels_are_told_before_a_run_on_gpus(monkeypatch):
    monkeypatch.setattr(requirements, "package_version", {"mamba-ssm": "1.9.9"}.get)
    check_machine(ROW, "cpu")
    check_machine(CATALOG.find("101"), "cuda")
    message = (
        r"681: Mamba layers on a GPU need causal-conv1d 1\.4\.0 or later \(not installed\) and mamba-ssm 2\.0\.0 or later"
        r" \(1\.9\.9\)\npip install .*DEVICE=cpu trains the miniature"
    )
    with pytest.raises(UserError, match=message):
        check_machine(ROW, "cuda")
    installed = {"mamba-ssm": "2.3.2.post1", "causal-conv1d": "1.10.0"}
    monkeypatch.setattr(requirements, "package_version", installed.get)
    check_machine(ROW, "cuda")
    assert mamba_kernels_lacking() == []


def test_doctor_says_what_mamba_layers_lack():
    assert mamba_kernels([], on_gpu=True).state == "ok"
    on_gpu, on_cpu = (
        mamba_kernels(["mamba-ssm 2.0.0 or later"], on_gpu=on) for on in (True, False)
    )
    assert on_gpu.state == on_cpu.state == "note", "other rows start without"
    assert "pip install" in on_gpu.remedy and "CPU miniatures do without" in on_cpu.text


# Predictions


def test_a_recurrence_costs_what_upstream_counts_where_it_is_twice_as_wide_as_the_hidden_state():
    assert step_flops(ROW) == upstream_flops(ROW)
    narrow = changed(mamba={"num_heads": 64})
    tokens = narrow.global_batch_size * narrow.seq_length
    width, hidden, state = 64 * 64, 4096, 128
    # of the whole width upstream counts gate, input and output, and the recurrence
    missing = 3 * 24 * tokens * (8192 - width) * (2 * hidden * 3 + 7 * state)
    assert upstream_flops(narrow) - step_flops(narrow) == missing


def test_only_attention_sees_other_tokens_at_a_cost_that_grows_with_the_length():
    longer = with_changes(ROW, seq_length=8192, global_batch_size=4)
    assert step_flops(longer) - step_flops(ROW) == 6 * 4096 * 4 * 8 * 4096**2


def test_tensor_and_context_parallel_ranks_share_out_what_a_mamba_layer_keeps():
    one, split = mamba_bytes(ROW), mamba_bytes(with_changes(ROW, tp=2, sequence_parallel=True))
    assert split == one / 2
    assert mamba_bytes(with_changes(ROW, cp=2)) == one / 2
    many = with_changes(ROW, tp=4, cp=4, sequence_parallel=True, seq_length=8192)
    tokens, inner, conv = channels(many)
    assert (tokens, inner, conv) == (8192, 512, 512 + 2 * 128), "two ranks have the same group"


def test_recomputation_keeps_only_inputs_of_layers():
    full = with_changes(ROW, recompute="full")
    hidden = 2 * ROW.seq_length * 4096
    assert predict(full).attention + predict(full).mlp == 52 * hidden / 2**30
    saved = sum(sum(one.saves) for one in layer_operations(ROW, "mamba"))
    assert saved == mamba_bytes(ROW)


def test_no_record_says_how_far_predictions_of_mamba_layers_are_off():
    """Once a run of such a row is recorded, ``capacity.unmeasured`` has to go."""
    ran = [json.loads(path.read_text()) for path in RECORDS.rglob("*.json")]
    assert not [one for one in ran if one.get("experiment", {}).get("model", {}).get("mamba")]
    assert capacity.unmeasured(ROW) == "no measured row has Mamba layers: error unknown"
    assert capacity.unmeasured(CATALOG.find("101")) == ""
    said = calibrations.load()["h200"].how_sure(ROW)
    assert said.startswith("no measured row has Mamba layers") and said.endswith("error unknown")
    assert {"Mamba layers", "no positions"} <= kinds(ROW) - kinds(CATALOG.find("101"))


def test_commands_say_that_nothing_was_measured(capsys):
    from harness.cli import main

    for command in ("memory", "speed"):
        assert main([command, "681"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "no measured row has Mamba layers" in said and "error unknown" in said
        assert "+-3%" not in said


def test_json_names_what_was_not_measured(capsys):
    from harness.cli import main

    for command in ("memory", "speed"):
        assert main([command, "681", "CARD=h200-141gb", "FORMAT=json"]) == 0
        (said,) = json.loads(capsys.readouterr().out)
        assert said["unseen"].count("Mamba layers") == 1 and said["band"] is None


def test_a_step_is_the_work_of_all_its_layers():
    work = StepWork(ROW, calibrations.load()["h200"].speed())
    assert set(work.layers) == {"mamba", "attention", "mlp"}
    whole = work.passes(stages.of_model(ROW))
    of_layers = [work.layers[kind] for kind in ("mamba", "mlp", "attention")]
    products = sum(
        number * layer[0].products for number, layer in zip((24, 24, 4), of_layers, strict=True)
    )
    assert whole[0].products == pytest.approx(products)
    weights = count_parameters(ROW).total - 2 * 131072 * 4096
    linears = 2 * weights * ROW.seq_length / work.flop_per_s
    assert linears < whole[0].products < 1.05 * linears, "and the scan's"
    assert work.layers["attention"][0].attention > 0 == work.layers["mamba"][0].attention


# The miniature


def test_the_miniature_has_every_kind_of_layer_in_every_chunk():
    small = miniature(ROW)
    assert small.model.layer_pattern == "M*-" and small.model.num_layers == 3
    assert small.model.mamba.num_groups == 8, "tensor parallelism splits as many"
    piped = miniature(with_changes(SPLIT, pp=2, vpp=2, tp=2))
    assert layer_pattern(piped) == "|".join(["M*-"] * 4) and (piped.tp, piped.pp, piped.vpp) == (
        2,
        2,
        2,
    )
    uneven = miniature(with_changes(ROW, pp=2, first_stage_layers=20))
    assert sum(map(len, layer_pattern(uneven).split("|"))) == uneven.model.num_layers


@pytest.mark.parametrize(
    ("pattern", "run"), [("M-M-M*-", "M*-"), ("M-M", "M-"), ("MMM", "M"), ("*-M-*", "*-M")]
)
def test_the_shortest_run_with_every_kind_of_layer(pattern, run):
    assert shortest_run(pattern) == run


@pytest.mark.cpu
def test_the_miniature_trains_and_another_layout_resumes_it(tmp_path):
    settings = ("681", "LR=3e-3", "EVAL_STEPS=0", "SAVE=1")
    path = run(tmp_path, *settings, "STEPS=24")
    first = losses(path)
    assert len(first) == 24 and first[-1] < first[0] - 0.2
    on = losses(run(tmp_path, *settings, "STEPS=30", "RESUME=1", "FORCE=1", "TP=2", "SP=1"))
    assert len(on) == 30 and on[:24] == first and on[-1] < first[-1]


# Upstream's layers on a CPU


@pytest.fixture(scope="module")
def kept():
    """Bytes that upstream's modules keep, by case (tests/count_saved.py)."""
    pytest.importorskip("megatron.core")
    return answer("tests.count_saved")


@pytest.mark.cpu
def test_a_mamba_layer_keeps_what_upstreams_keeps(kept):
    from tests import count_saved as sizes

    small = changed(
        mamba=sizes.MAMBA,
        hidden_size=sizes.SIZES["hidden_size"],
        num_attention_heads=4,
        num_query_groups=4,
    )
    small = with_changes(small, seq_length=sizes.LENGTH, micro_batch_size=sizes.BATCH)
    of_decays = 4 * sizes.MAMBA["num_heads"]  # A, an element a head
    assert mamba_bytes(small) + of_decays == kept["mamba"]


def recurrence(inputs, decays, written, read):
    """The definition, token by token: state_t = exp(decay_t) state_{t-1} + inputs_t written_t^T; output_t = state_t read_t."""
    import torch

    each = inputs.shape[2] // written.shape[2]
    written, read = (tensor.repeat_interleave(each, dim=2) for tensor in (written, read))
    state, outputs = torch.zeros(*inputs.shape[:1], *inputs.shape[2:], written.shape[-1]), []
    for t in range(inputs.shape[1]):
        state = decays[:, t, :, None, None].exp() * state
        state = state + inputs[:, t, :, :, None] * written[:, t, :, None]
        outputs.append((state @ read[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, 1)


def random_inputs(length, heads=6, groups=2):
    import torch

    torch.manual_seed(length)
    inputs = torch.randn(2, length, heads, 5)
    decays = -torch.rand(2, length, heads) * 3
    written, read = torch.randn(2, 2, length, groups, 4)
    return [tensor.requires_grad_() for tensor in (inputs, decays, written.clone(), read.clone())]


@pytest.mark.cpu
@pytest.mark.parametrize(("length", "chunk"), [(1, 8), (8, 8), (16, 8), (21, 8), (5, 128)])
def test_the_scan_in_chunks_is_the_recurrence(length, chunk):
    torch = pytest.importorskip("torch")
    pytest.importorskip("megatron.core")
    from harness.cpu.mamba import chunked_scan

    tensors = random_inputs(length)
    ours, theirs = chunked_scan(*tensors, chunk), recurrence(*tensors)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), tensors),
        torch.autograd.grad((theirs * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.cpu
def test_decays_that_forget_everything_leave_no_infinite_gradient():
    torch = pytest.importorskip("torch")
    from harness.cpu.mamba import chunked_scan

    inputs, _, written, read = random_inputs(16)
    decays = torch.full((2, 16, 6), -300.0, requires_grad=True)
    outputs = chunked_scan(inputs, decays, written, read, 8)
    outputs.sum().backward()
    assert torch.isfinite(outputs).all() and torch.isfinite(decays.grad).all()


@pytest.mark.cpu
def test_a_mixers_inside_is_its_definition():
    """Convolution, time steps, recurrence, skip and gate, one token after the other (arXiv:2405.21060, section 7.1)."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("megatron.core")
    from torch.nn import functional

    from harness.cpu.mamba import mamba_split_conv1d_scan_combined as mixed

    batch, length, heads, head, groups, state = 2, 13, 4, 3, 2, 5
    inner, conv = heads * head, heads * head + 2 * groups * state
    torch.manual_seed(0)
    whole = torch.randn(batch, length, inner + conv + heads)
    weight, bias = torch.randn(conv, CONV_WIDTH), torch.randn(conv)
    dt_bias, a, d = torch.randn(heads), -torch.rand(heads) - 0.5, torch.randn(heads)
    ours = mixed(
        whole,
        weight,
        bias,
        dt_bias,
        a,
        D=d,
        chunk_size=4,
        headdim=head,
        ngroups=groups,
        norm_before_gate=False,
    )

    gate, before, steps = whole.split([inner, conv, heads], dim=-1)
    after = torch.zeros(batch, length, conv)
    for t in range(length):
        for back in range(CONV_WIDTH):
            if t >= back:
                after[:, t] += before[:, t - back] * weight[:, CONV_WIDTH - 1 - back]
    after = functional.silu(after + bias)
    x, written, read = after.split([inner, groups * state, groups * state], dim=-1)
    x = x.unflatten(-1, (heads, head))
    steps = torch.log1p(torch.exp(steps + dt_bias))
    written, read = (tensor.unflatten(-1, (groups, state)) for tensor in (written, read))
    scanned = recurrence(x * steps[..., None], steps * a, written, read) + d[:, None] * x
    theirs = scanned.flatten(-2) * gate * torch.sigmoid(gate)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    half = mixed(
        whole.bfloat16(),
        weight.bfloat16(),
        bias.bfloat16(),
        dt_bias,
        a,
        D=d,
        chunk_size=4,
        headdim=head,
        ngroups=groups,
    )
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), theirs, rtol=0.05, atol=0.1)
    with pytest.raises(UserError, match="Mamba layers have no seq_idx"):
        mixed(
            whole,
            weight,
            bias,
            dt_bias,
            a,
            d,
            4,
            headdim=head,
            ngroups=groups,
            seq_idx=torch.zeros(1),
        )


@pytest.mark.cpu
def test_the_norm_behind_a_scan_is_of_each_group():
    torch = pytest.importorskip("torch")
    from harness.cpu.mamba import RMSNorm

    norm, x, z = RMSNorm(12, eps=0.0, group_size=4), torch.randn(2, 3, 12), torch.randn(2, 3, 12)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(12.0))
    for group in range(3):
        part = slice(4 * group, 4 * group + 4)
        scaled = x[..., part] / x[..., part].pow(2).mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(norm(x)[..., part], scaled * torch.arange(12.0)[part])
    gate = z * torch.sigmoid(z)
    torch.testing.assert_close(norm(x, z), norm(x) * gate)
    norm.norm_before_gate = False
    torch.testing.assert_close(norm(x, z), norm(x * gate))
