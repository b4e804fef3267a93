"""Traces made by hand, whose answers are worked out by hand: where the time of a step goes."""

import csv
import gc
import gzip
import io
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import ROOT
from harness.entry import profiler
from harness.entry.phases import wrap_phases
from harness.entry.report import RankReport
from harness.errors import UserError
from harness.evidence.records import record
from harness.evidence.references import load_references
from harness.experiment.catalog import load_catalog
from harness.experiment.overrides import apply
from harness.pages import profiles as pages
from harness.profiling import profile, summary, trace
from harness.profiling.kernels import Category, category_of
from harness.profiling.profile import Profile, find, of_run, render
from harness.profiling.summary import cut, summarise
from harness.profiling.trace import Activity, Range, parse, read
from harness.run.directory import RunDir
from harness.run.schema import StepMetrics
from harness.system.files import write_json
from harness.upstreams.megatron_lm.environment import variables

MAIN, AUTOGRAD, GLOO = 1, 2, 3
GEMM, LAYER_NORM = (
    "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT",
    "void transformer_engine::normalization::ln_fwd_tuned_kernel<...>",
)
ATTENTION = (
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0"
)
ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
ADAM = "void multi_tensor_apply_kernel<TensorListMetadata<5>, AdamFunctorMaster<...>>"
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"


def annotation(name: str, start: float, end: float) -> dict:
    return {
        "ph": "X",
        "cat": "user_annotation",
        "name": f"harness: {name}",
        "tid": MAIN,
        "ts": start,
        "dur": end - start,
    }


def operator(name: str, start: float, end: float, thread: int = MAIN) -> dict:
    return {
        "ph": "X",
        "cat": "cpu_op",
        "name": name,
        "tid": thread,
        "ts": start,
        "dur": end - start,
    }


class Gpu:
    """Kernels with the calls that launch them, as Kineto pairs them: by correlation."""

    def __init__(self) -> None:
        self.events: list[dict] = []

    def runs(
        self,
        name: str,
        start: float,
        end: float,
        called: float,
        returned: float,
        stream: int = 7,
        cat: str = "kernel",
    ) -> None:
        number = {"correlation": len(self.events) + 1}
        self.events += [
            {
                "ph": "X",
                "cat": "cuda_runtime",
                "name": "cudaLaunchKernel",
                "tid": AUTOGRAD,
                "ts": called,
                "dur": returned - called,
                "args": number,
            },
            {
                "ph": "X",
                "cat": cat,
                "name": name,
                "tid": stream,
                "ts": start,
                "dur": end - start,
                "args": {**number, "stream": stream},
            },
        ]


@pytest.fixture
def events() -> list[dict]:
    """One step from 0 to 1000 µs: NCCL beneath kernels of another stream, gaps, and a copy behind the optimizer."""
    gpu = Gpu()
    gpu.runs(GEMM, 100, 300, called=50, returned=60)
    gpu.runs(LAYER_NORM, 310, 350, called=70, returned=80)
    gpu.runs(ALL_REDUCE, 340, 540, called=310, returned=315, stream=20)
    gpu.runs(ATTENTION, 400, 500, called=390, returned=395)
    gpu.runs(ADAM, 700, 780, called=690, returned=695)
    gpu.runs(
        "Memcpy DtoD (Device -> Device)",
        770,
        800,
        called=760,
        returned=762,
        stream=8,
        cat="gpu_memcpy",
    )
    gpu.runs(ADD, 800, 820, called=700, returned=702)
    gpu.runs("mystery_kernel", 900, 910, called=890, returned=899)
    ranges = [
        annotation("step 8", 0, 1000),
        annotation("forward", 10, 300),
        annotation("backward", 300, 600),
        annotation("optimizer", 600, 880),
    ]
    return [
        *gpu.events,
        *ranges,
        operator("aten::linear", 40, 60),
        {"ph": "f", "cat": "ac2g", "ts": 100, "name": "ac2g"},
        {
            "ph": "X",
            "cat": "gpu_user_annotation",
            "name": "harness: forward",
            "tid": 7,
            "ts": 100,
            "dur": 240,
        },
    ]


def test_every_moment_counts_once(events):
    found = summarise(parse(events, "cuda"), rank=0)
    us = {category: round(ms * 1e3) for category, ms in found.categories.items()}
    assert us == {
        "gemm": 200,
        "attention": 100,
        "elementwise": 40,
        "optimizer": 80 + 20,  # the elementwise kernel too: optimizer.step launched it
        "other": 10,
        "communication": 50 + 40,  # 340 to 540 without what the layer norm and attention cover
        "memory": 20,  # the other half runs beneath the optimizer
        "launch_bound": 60
        + 155
        + 79
        + 90,  # from idle until the launching call returns; to the step's end
        "idle": 40 + 10 + 5 + 1,
    }
    assert sum(us.values()) == round(found.step_ms * 1e3) == 1000
    assert (found.communication_ms, found.hidden_ms) == pytest.approx((0.200, 0.110))
    assert [(kernel.name, kernel.ms, kernel.calls) for kernel in found.unknown] == [
        ("mystery_kernel", 0.010, 1)
    ]


def test_phases_follow_the_launch_not_the_moment(events):
    found = summarise(parse(events, "cuda"), rank=0)
    us = {phase: round(ms * 1e3) for phase, ms in found.phases.items()}
    assert us == {
        "forward": 100 + 200 + 10 + 40,
        "backward": 50 + 100 + 40,
        "optimizer": 160 + 80 + 20 + 20,
        "rest": 80 + 10 + 90,
    }
    assert found.forward_pass.model_dump() == pytest.approx({"ms": 0.240, "calls": 1})
    assert found.backward_pass.ms == pytest.approx(
        0.190
    )  # exposed communication included, waiting not


def test_steps_are_averaged_and_what_is_between_them_is_left_out():
    gpu = Gpu()
    gpu.runs(GEMM, 50, 200, called=0, returned=10)  # 100 µs of it within the first step
    gpu.runs(
        GEMM, 250, 350, called=240, returned=245
    )  # evaluation, in no step: 50 µs of it within the first
    gpu.runs(ADD, 500, 600, called=405, returned=410)
    found = summarise(
        parse(
            [*gpu.events, annotation("step 8", 100, 300), annotation("step 9", 400, 600)], "cuda"
        ),
        rank=0,
    )
    assert found.steps == 2 and found.step_ms == pytest.approx(0.200)
    assert found.categories[Category.GEMM] == pytest.approx(0.075)
    assert found.categories[Category.ELEMENTWISE] == pytest.approx(0.050)
    assert found.categories[Category.LAUNCH_BOUND] == pytest.approx((45 + 10) / 2 * 1e-3)
    assert sum(found.categories.values()) == pytest.approx(found.step_ms)
    assert found.forward_pass is None


def test_kernels_of_a_graph_share_one_launch():
    gpu = Gpu()
    gpu.runs(GEMM, 20, 30, called=0, returned=10)
    launch, kernel = gpu.events
    events = [launch, kernel, kernel | {"ts": 40}, kernel | {"ts": 45}, annotation("step 8", 0, 55)]
    found = summarise(parse(events, "cuda"), rank=0).categories
    assert {name: round(ms * 1e3) for name, ms in found.items() if ms} == {
        "gemm": 25,
        "launch_bound": 10,
        "idle": 20,
    }


def test_any_overlap_adds_up_and_agrees_with_painting_each_microsecond():
    """Overlaps at random on five streams, beside the same rule applied to each µs on its own."""
    dice = random.Random(1)
    kinds = [c for c in Category if c not in (Category.LAUNCH_BOUND, Category.IDLE)]
    step = Range(1000, 4000, "8")
    activities = tuple(
        sorted(
            (
                Activity(
                    start := dice.randrange(500, 4500),
                    start + dice.randrange(60),
                    "",
                    dice.choice(kinds),
                )
                for _ in range(250)
            ),
            key=lambda a: a.start,
        )
    )
    slices = list(cut(activities, step))
    assert [s.start for s in slices] == [step.start, *(s.end for s in slices[:-1])] and slices[
        -1
    ].end == step.end
    painted, hidden = dict.fromkeys(Category, 0), 0
    for at in range(1000, 4000):
        running = {a.category for a in activities if a.start <= at < a.end}
        painted[min(running, key=list(Category).index, default=Category.IDLE)] += 1
        hidden += Category.COMMUNICATION in running and bool(running & summary.COMPUTE)
    found = summarise(trace.Trace("cuda", (step,), (), activities), rank=0)
    found_us = {category: ms * 1e3 for category, ms in found.categories.items()}
    found_us[Category.IDLE] += found_us.pop(Category.LAUNCH_BOUND)
    painted.pop(Category.LAUNCH_BOUND)
    assert found_us == pytest.approx(painted)
    assert found.hidden_ms * 1e3 == pytest.approx(hidden)


def test_on_a_cpu_the_innermost_operator_counts():
    events = [
        annotation("step 3", 0, 100),
        annotation("forward", 0, 50),
        annotation("backward", 50, 90),
        operator("aten::linear", 10, 30),
        operator("aten::addmm", 15, 25),
        operator("aten::copy_", 15, 17),
        operator("_AllToAll", 35, 66),
        operator("aten::bmm", 40, 45),
        operator("aten::mm", 45, 48),
        operator("custom::op", 70, 74),
        operator("aten::mul", 0, 90, thread=GLOO),  # not the main thread
        {
            "ph": "X",
            "cat": "user_annotation",
            "name": "gloo:all_reduce",
            "tid": GLOO,
            "ts": 44,
            "dur": 16,
        },
    ]
    found = summarise(parse(events, "cpu"), rank=0)
    us = {category: round(ms * 1e3) for category, ms in found.categories.items() if ms}
    assert us == {
        "elementwise": 5 + 5,
        "memory": 2,
        "gemm": 8 + 3,
        "attention": 5,
        "communication": 12,
        "other": 4,
        "idle": 56,
    }
    assert (found.communication_ms, found.hidden_ms) == pytest.approx((0.016, 0.004))
    assert found.phases == pytest.approx(
        {"forward": 0.060, "backward": 0.014, "optimizer": 0, "rest": 0.026}
    )


@pytest.mark.parametrize(
    ("name", "category"),
    [
        (GEMM, "gemm"),
        (LAYER_NORM, "elementwise"),
        (ATTENTION, "attention"),
        (ALL_REDUCE, "communication"),
        (ADAM, "optimizer"),
        (ADD, "elementwise"),
        (
            "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
            "gemm",
        ),
        (
            "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_tn_align8>(...)",
            "gemm",
        ),
        (
            "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, false, false>",
            "gemm",
        ),
        (
            "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false, false>",
            "gemm",
        ),
        (
            "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<...>>>",
            "attention",
        ),
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::bfloat16_t>>",
            "attention",
        ),
        (
            "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<...>::Params)",
            "attention",
        ),
        (
            "void (anonymous namespace)::softmax_warp_forward<float, float, float, 5, false, false>",
            "attention",
        ),
        ("transformer_engine::scaled_upper_triang_masked_softmax_warp_forward<...>", "attention"),
        ("void transformer_engine::normalization::rmsnorm_bwd_tuned_kernel<...>", "elementwise"),
        (
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>",
            "elementwise",
        ),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::NormTwoOps<float>>>",
            "elementwise",
        ),
        ("triton_poi_fused_add_gelu_0", "elementwise"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<...>", "elementwise"),
        (
            "void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128, 1, 1>(cudnn::fusion::compute_dot_do_o_params)",
            "attention",
        ),
        ("void cudnn::fusion::convert_dq_to_16bits_specialized<true, __nv_bfloat16>", "attention"),
        ("void (anonymous namespace)::grouped_bias_add_kernel<__nv_bfloat16>", "elementwise"),
        ("_row_id_map_pass_1_kernel", "elementwise"),
        (
            "void transformer_engine::(anonymous namespace)::HadamardTransformKernel<__nv_bfloat16, 16>",
            "elementwise",
        ),
        ("_permute_kernel", "elementwise"),
        ("void linearize_index_kernel<long>(at::GenericPackedTensorAccessor<...>)", "elementwise"),
        (
            "void multi_tensor_apply_kernel<TensorListMetadata<1>, L2NormFunctor<float>, float*, float*, bool, int>",
            "optimizer",
        ),
        (
            "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
            "communication",
        ),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("gloo:all_gather", "communication"),
        ("c10d::allreduce_", "communication"),
        ("aten::addmm", "gemm"),
        ("aten::baddbmm", "attention"),
        ("aten::native_layer_norm", "elementwise"),
        ("aten::copy_", "memory"),
        ("custom::op", "other"),
    ],
)
def test_names(name, category):
    assert category_of(name) == category


def test_which_steps_are_traced_and_which_are_disturbed():
    find_ = load_catalog().find
    assert apply(find_("101"), {"PROFILE": "0"}) is find_("101")
    e = apply(find_("101"), {"PROFILE": "1"})
    assert (e.profile, e.label, list(e.disturbed_steps)) == (
        (8, 9),
        "101-gpt2xl-dp1-gbs1-bf16_profile1",
        [7, 8, 9, 10],
    )
    assert apply(find_("101"), {"PROFILE": "12-12"}).profile == (12, 12)
    assert apply(find_("101"), {"PROFILE": "2-5", "STEPS": "5"}).profile == (2, 5)
    assert [(v.name, v.value) for v in variables(e, "cuda")][-1] == ("HARNESS_PROFILE", "8-9")
    assert not list(find_("101").disturbed_steps)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2", "PROFILE=2: expected 1, or the first and the last step to trace, such as 8-10"),
        ("8-", "PROFILE=8-: expected 1"),
        ("1.5-3", "expected 1"),
        ("٣-٤", "expected 1"),
        ("1-3", "traces from step 1 to step 3, which must be 2 or later"),
        ("9-8", "from step 9 to step 8, which must be 2 or later, in order"),
        ("1", "among the 5 steps of the run; try PROFILE=4-5, or STEPS=9"),
    ],
)
def test_steps_that_cannot_be_traced(value, message):
    with pytest.raises(UserError, match=message):
        apply(load_catalog().find("101"), {"PROFILE": value, "STEPS": "5"})


@pytest.mark.parametrize(
    ("value", "steps", "way_out"),
    [
        ("1", "1", "STEPS=9"),
        ("1-1", "1", "STEPS=2 PROFILE=2-2"),
        ("9-3", "20", "PROFILE=3-9"),
        ("9-1", "20", "PROFILE=19-20"),
        ("30-40", "20", "PROFILE=19-20, or STEPS=40"),
    ],
)
def test_the_way_out_of_steps_that_cannot_be_traced_is_one(value, steps, way_out):
    with pytest.raises(UserError, match=f"steps of the run; try {way_out}$"):
        apply(load_catalog().find("101"), {"PROFILE": value, "STEPS": steps})
    words = dict(word.split("=") for word in way_out.partition(",")[0].split())
    assert apply(load_catalog().find("101"), {"PROFILE": value, "STEPS": steps} | words).profile


@pytest.mark.parametrize(
    ("events", "device", "message"),
    [
        (
            [operator("aten::mm", 0, 1)],
            "cpu",
            "holds no training step\nrun it again with PROFILE=1",
        ),
        (
            [annotation("step 8", 0, 9), operator("aten::mm", 0, 1)],
            "cuda",
            "holds no GPU kernel\nCUPTI delivered none",
        ),
        ([annotation("step 8", 0, 9)], "cpu", "holds no operator"),
    ],
)
def test_a_trace_without_what_it_needs_is_refused(events, device, message):
    with pytest.raises(UserError, match=message):
        parse(events, device)


def test_a_torn_trace_is_refused(tmp_path, events):
    whole = gzip.compress(json.dumps({"traceEvents": events}).encode())
    path = tmp_path / "0.json.gz"
    for content in (
        whole[:-50],
        b"not gzip",
        gzip.compress(b'{"traceEv'),
        gzip.compress(b"[]"),
        gzip.compress(b"{}"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is not a complete trace"):
            read(path, "cuda")
    path.write_bytes(whole)
    assert len(read(path, "cuda").activities) == 8
    with pytest.raises(UserError, match=r"no trace .*\nthe run ended before"):
        read(tmp_path / "1.json.gz", "cuda")


RESULT = json.loads((ROOT / "experiments/records/h200-141gb/101.json").read_text())


@pytest.fixture
def run(tmp_path, events) -> RunDir:
    """A run of 101 with PROFILE=1 on a GPU, whose two ranks saw the same."""
    experiment = apply(load_catalog().find("101"), {"PROFILE": "1", "STEPS": "20"})
    run = RunDir(tmp_path / "outdir" / experiment.label)
    run.traces.mkdir(parents=True)
    run.freeze_experiment(experiment, "cuda", "abc")
    write_json(run.environment, RESULT["environment"])
    write_json(run.result, RESULT)
    for rank in (0, 10):
        (run.traces / f"{rank}.json.gz").write_bytes(
            gzip.compress(json.dumps({"traceEvents": events}).encode())
        )
    return run


def test_the_profile_of_a_run_is_computed_once_and_found_by_id(run, tmp_path):
    assert [rank.rank for rank in of_run(run).ranks] == [0, 10]
    for path in run.traces.iterdir():
        path.unlink()
    found = find(run.path.parent, tmp_path / "records", "101")
    assert found == of_run(run) and found == find(run.path.parent, tmp_path, run.label)
    assert (found.first_step, found.last_step, found.untraced_step_ms) == (
        8,
        9,
        RESULT["step_ms"]["median"],
    )
    with pytest.raises(UserError, match=f"no traced run is called 1011; valid: {run.label}"):
        find(run.path.parent, tmp_path, "1011")


def test_why_there_is_no_profile(run, tmp_path):
    for path in run.traces.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="left no trace of steps 8 to 9: it did 20 steps"):
        of_run(run)
    run.freeze_experiment(load_catalog().find("101"), "cuda", "abc")
    with pytest.raises(
        UserError, match="was not traced\nrun it with PROFILE=1: make 101 PROFILE=1"
    ):
        of_run(run)
    with pytest.raises(
        UserError, match="no traced run is called 101; trace one: make 101 PROFILE=1"
    ):
        find(tmp_path / "none", tmp_path / "none", "101")


def test_a_warning_for_a_run_that_is_over_without_a_profile(run, capsys):
    for path in run.traces.iterdir():
        path.write_bytes(b"torn")
    profile.tell(run)
    assert "warning: no profile: " in capsys.readouterr().err


def test_the_forms_of_a_profile(run):
    found = of_run(run)
    lines = render(found).splitlines()
    assert lines[1].split() == ["rank", "0", "rank", "10"]
    assert ["communication,", "exposed", *["0.09", "9.0%"] * 2] in map(str.split, lines)
    assert ["step,", "traced", *["1.00", "100.0%"] * 2] in map(str.split, lines)
    assert any(
        line.startswith("other kernels on rank 10, ms per step: mystery_kernel 0.01")
        for line in lines
    )
    assert Profile.model_validate_json(render(found, "json")) == found
    rows = list(csv.DictReader(io.StringIO(render(found, "csv"))))
    for quantity in ("category", "phase"):
        parts = [
            float(row["share"]) for row in rows if (row["rank"], row["quantity"]) == ("0", quantity)
        ]
        assert len(parts) > 3 and sum(parts) == pytest.approx(1)
    with pytest.raises(UserError, match="FORMAT=xml; valid: terminal, csv, json"):
        render(found, "xml")


def test_a_profiled_run_becomes_no_record_but_a_profile_beside_them(run, tmp_path):
    records = tmp_path / "records"
    kept = record(run, records)
    assert [path.relative_to(records) for path in records.rglob("*.*")] == [
        Path("h200-141gb/profiles/101.json")
    ]
    assert (
        find(tmp_path / "none", records, "101")
        == find(tmp_path / "none", records, "h200-141gb/101")
        == of_run(run)
    )
    assert json.loads(kept.read_text())["environment"] == RESULT["environment"]


def test_the_optimizer_is_as_it_was_after_a_step():
    class Optimizer:
        def step(self):
            return "stepped"

    heard = []

    def train_step(
        forward_step,
        iterator,
        model,
        optimizer,
        scheduler,
        config,
        forward_backward,
        iteration=None,
    ):
        return forward_backward(), optimizer.step(), iteration

    def wrap(phase, work):
        def wrapped():
            heard.append(phase)
            return work()

        return wrapped

    training = SimpleNamespace(train_step=train_step)
    wrap_phases(training, wrap, lambda: heard.append("begin"))
    optimizer, graphed = Optimizer(), Optimizer()
    graphed.step = captured = lambda: "graph"
    assert training.train_step(0, 0, 0, optimizer, 0, 0, lambda: "losses", iteration=4) == (
        "losses",
        "stepped",
        4,
    )
    assert training.train_step(0, 0, 0, graphed, 0, 0, lambda: "losses")[1] == "graph"
    assert heard == ["begin", "forward_backward", "optimizer"] * 2
    assert "step" not in vars(optimizer) and graphed.step is captured


def test_full_collections_are_reported_with_their_step(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_DEVICE", "cpu")
    monkeypatch.setattr(
        "harness.entry.report.faulthandler",
        SimpleNamespace(enable=lambda: None, register=lambda *_: None),
    )
    report = RankReport(RunDir(tmp_path))
    try:
        report.start()
        report.after_step(6)
        gc.collect(1)
        gc.collect()
        report.write()
    finally:
        gc.callbacks.pop()
    (rank,) = RunDir(tmp_path).read_ranks()
    assert list(rank.gc_ms) == [7] and rank.gc_ms[7] > 0


def test_a_profiler_that_fails_does_not_end_the_run(tmp_path, capsys):
    def stop():
        raise RuntimeError("CUPTI_ERROR_NOT_INITIALIZED")

    tracer = profiler._Tracer(RankReport(RunDir(tmp_path)), first=8, last=9)
    tracer._profile = SimpleNamespace(stop=stop)
    for step in (7, 8, 9, 10):
        tracer.after(step)
    assert (
        capsys.readouterr().err
        == "harness: no trace of rank 0, the run continues: CUPTI_ERROR_NOT_INITIALIZED\n"
    )
    assert not RunDir(tmp_path).traces.exists()


def test_profiles_on_a_page(run, tmp_path):
    record(run, tmp_path)
    published = load_references().published.matching("282").reference
    lines = pages.profiles(tmp_path / "h200-141gb", ["282h", "101"], [published, None]).splitlines()
    assert lines[0].startswith("- 282h: not measured yet; `make 282h PROFILE=1`")
    assert (
        "| ms a step | 101 |" in lines
        and "| communication, exposed | 0.1 (9%) |" in lines
        and "| other | 0.5 (46%) |" in lines
    )
    assert f"| the run's other steps | {of_run(run).untraced_step_ms:.1f} |" in lines
    assert (
        lines[-1]
        == "282 as published: forward 135 ms, backward 215 ms, other 105 ms, together 455 of a step of 427 ms."
    )


def test_a_damaged_profile_is_named(tmp_path):
    (tmp_path / profile.FOLDER).mkdir()
    write_json(tmp_path / profile.FOLDER / "101.json", {"label": 1})
    with pytest.raises(UserError, match="label: Input should be a valid string"):
        pages.profiles(tmp_path, ["101"], [])


def test_slow_steps_on_a_page(tmp_path):
    steps = [
        StepMetrics(step=step, step_ms=ms, time=0)
        for step, ms in enumerate([900, 100, 100, 100, 100, 100, 101, 460, 100, 99], 1)
    ]
    for name in ("101", "104"):
        (tmp_path / f"{name}.metrics.jsonl").write_text(
            "".join(f"{step.model_dump_json()}\n" for step in steps)
        )
        steps[7] = steps[6]
    rows = [
        SimpleNamespace(
            kind="record", origin=tmp_path / f"{id_}.json", experiment=load_catalog().find(id_)
        )
        for id_ in ("101", "104", "111")
    ]
    (tmp_path / "111.metrics.jsonl").touch()  # out of memory before its first step
    lines = pages.slow_steps(rows).splitlines()
    assert lines[2:] == ["| 101 | 1 | 5 | 100 | 8 (+360 ms) |", "", "None in 104."]


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "experiments/records").glob(f"*/{profile.FOLDER}/*.json")),
    ids=lambda p: p.stem,
)
def test_recorded_profiles_add_up(path):
    found = Profile.model_validate_json(path.read_text())
    for rank in found.ranks:
        assert sum(rank.categories.values()) == pytest.approx(rank.step_ms)
        assert sum(rank.phases.values()) == pytest.approx(rank.step_ms)
        assert all(
            category_of(kernel.name) == kernel.category
            or kernel.category in ("optimizer", "memory")
            for kernel in rank.kernels
        )
