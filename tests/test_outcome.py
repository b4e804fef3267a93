"""Outcomes from what torchrun, PyTorch, NCCL and Megatron-LM print (test_outcome_logs/ was captured)."""

import signal
from pathlib import Path

import pytest

from harness.experiment.experiment import Experiment
from harness.experiment.model import Model
from harness.launching.hangs import by_frame
from harness.launching.outcome import Evidence, classify, memory_levers
from harness.run.schema import RankError, StepMetrics

LOGS = Path(__file__).with_name("test_outcome_logs")

OOM = (
    "CUDA out of memory. Tried to allocate 2.93 GiB. GPU 0 has a total capacity of 139.81 GiB of which "
    "63.10 GiB is free. 76.70 GiB allowed; Process 4 has 76.69 GiB memory in use. Of the allocated memory "
    "75.05 GiB is allocated by PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated."
)
WATCHDOG = (
    "[rank3]:[E1121 08:47:11.661 ProcessGroupNCCL.cpp:685] [Rank 3] Watchdog caught collective operation "
    "timeout: WorkNCCL(SeqNum=41, OpType=ALLREDUCE, NumelIn=12800, NumelOut=12800, Timeout(ms)=600000) ran "
    "for 600021 milliseconds before timing out.\n"
)
NAN_RERUN = (
    "ERROR:megatron.core.rerun_state_machine:Unexpected result nan on rank 1 at iteration #7 invocation #1 "
    "(message='found NaN in local forward loss calculation')\n"
)
SUMMARY = """
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_08:47:11
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : {exitcode} (pid: 10896)
  error_file: <N/A>
  traceback : Signal
"""


def experiment(**changes) -> Experiment:
    model = Model(name="tiny", num_layers=4, hidden_size=64, num_attention_heads=4)
    fields = {
        "id": "101",
        "slug": "x",
        "chapter": 100,
        "shows": "x",
        "model": model,
        "mbs": 4,
        "gbs": 8,
        "seq": 64,
        "dp": 2,
    }
    return Experiment(**{**fields, "steps": 20, **changes})


def error(
    rank: int, message: str, time: float, type_: str = "RuntimeError", traceback: str = ""
) -> RankError:
    return RankError(rank=rank, type=type_, message=message, traceback=traceback, time=time)


def metrics(*losses: float) -> tuple[StepMetrics, ...]:
    return tuple(
        StepMetrics(step=i, loss=loss, step_ms=1.0, time=i) for i, loss in enumerate(losses, 1)
    )


def captured(name: str) -> str:
    return (LOGS / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    ("log", "status", "rank", "detail", "advice"),
    [
        (
            "unknown_argument",
            "bad-configuration",
            1,
            "unrecognized arguments: --no-such-flag 3",
            "make arguments",
        ),
        (
            "bad_value",
            "bad-configuration",
            1,
            "--micro-batch-size: invalid int value: 'x'",
            "ARGS=",
        ),
        (
            "sizes_do_not_fit",
            "bad-configuration",
            1,
            "world size (2) is not divisible by total",
            "command.sh",
        ),
        ("rank_raises", "crash", 1, "ValueError: head count 3 does not divide", "logs.txt"),
        ("raises_before_init", "crash", 1, "ValueError: head count 3 does not divide", "logs.txt"),
        ("sigkill", "crash", 1, "ended by SIGKILL", "dmesg"),
        ("sigsegv", "crash", 1, "ended by SIGSEGV", "logs.txt"),
        (
            "host_allocation",
            "oom-host",
            1,
            "you tried to allocate 400000000000000 bytes",
            "ran out of memory",
        ),
        ("port_in_use", "crash", None, "EADDRINUSE", "RENDEZVOUS="),
    ],
)
def test_captured_logs_are_recognised(log, status, rank, detail, advice):
    outcome = classify(Evidence(exit_code=1, log=captured(log)), experiment())
    assert (outcome.status, outcome.rank) == (status, rank)
    assert detail in outcome.detail
    assert advice in outcome.advice


@pytest.mark.parametrize(
    ("words", "detail"),
    [
        (
            "malloc(): unaligned tcache chunk detected",
            ": malloc(): unaligned tcache chunk detected",
        ),
        ("free(): double free detected in tcache 2", ": free(): double free detected in tcache 2"),
        (
            "terminate called after throwing an instance of 'gloo::EnforceNotMet'\n  what():  [enforce fail at pair.cc:446] 8 vs 4",
            ": terminate called after throwing an instance of 'gloo::EnforceNotMet' what(): [enforce fail at pair.cc:446] 8 vs 4",
        ),
        (
            "python: pair.cc:446: bool read(): Assertion `length <= 4' failed.",
            ": python: pair.cc:446: bool read(): Assertion",
        ),
        ("iteration 5/ 6 | free memory: 3 (MB)", None),
    ],
)
def test_of_a_rank_that_aborts_the_last_words_are_shown(words, detail):
    log = f"iteration 4/ 6\n{words}\n\nFatal Python error: Aborted\n" + captured("sigsegv").replace(
        "exitcode  : -11", "exitcode  : -6"
    )
    outcome = classify(Evidence(exit_code=1, log=log), experiment())
    assert (outcome.status, outcome.rank) == ("crash", 1)
    assert outcome.detail.startswith("ended by SIGABRT" + (detail or ""))
    assert detail or outcome.detail == "ended by SIGABRT"


def test_a_gpu_out_of_memory_names_the_rank_and_the_levers():
    outcome = classify(
        Evidence(exit_code=1, errors=(error(5, OOM, 9.0, "OutOfMemoryError"),)), experiment()
    )
    assert (outcome.status, outcome.rank) == ("oom", 5)
    assert outcome.detail.startswith(
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.93 GiB."
    )
    assert len(outcome.detail.splitlines()) <= 3
    assert "MBS=2" in outcome.advice


def test_the_first_error_in_time_is_shown_and_its_echoes_are_not():
    errors = (
        error(0, "[enforce fail] Connection closed by peer [127.0.0.1]:36211", 5.0),
        error(1, "shapes do not fit", 5.1, "ValueError"),
        error(2, "another one, later", 5.2, "ValueError"),
    )
    outcome = classify(Evidence(exit_code=1, errors=errors), experiment())
    assert (outcome.status, outcome.rank) == ("crash", 1)
    assert "ValueError: shapes do not fit" in outcome.detail


def test_a_killed_rank_is_the_cause_of_connections_that_others_lost():
    errors = (error(0, "Connection closed by peer [127.0.0.1]:36211", 1763714826.9),)
    outcome = classify(Evidence(exit_code=1, errors=errors, log=captured("sigkill")), experiment())
    assert (outcome.status, outcome.rank) == ("crash", 1)


@pytest.mark.parametrize("seen", [{"oom_kills": 1}, {"least_free_share": 0.01}])
def test_a_rank_killed_while_memory_was_short_died_of_it(seen):
    outcome = classify(Evidence(exit_code=1, log=captured("sigkill"), **seen), experiment())
    assert (outcome.status, outcome.rank) == ("oom-host", 1)
    assert "for lack of memory" in outcome.detail
    assert "fewer than 2 ranks" in outcome.advice
    alone = classify(Evidence(exit_code=1, log=captured("sigkill"), **seen), experiment(dp=1))
    assert alone.advice.startswith("the host ran out of memory: a smaller SEQ=")


@pytest.mark.parametrize(
    ("log", "status", "rank"),
    [
        (WATCHDOG + SUMMARY.format(exitcode=-6), "hang", 3),
        (NAN_RERUN + SUMMARY.format(exitcode=17), "nan", 1),
        (
            "NCCL WARN Error: failed to extend /dev/shm/nccl-x to 9 bytes\n"
            + SUMMARY.format(exitcode=1),
            "crash",
            1,
        ),
        (SUMMARY.format(exitcode=-7), "crash", 1),
        ("OSError: [Errno 28] No space left on device\n" + SUMMARY.format(exitcode=1), "crash", 1),
    ],
)
def test_failures_without_an_exception_are_found_in_the_log(log, status, rank):
    outcome = classify(Evidence(exit_code=1, log=log), experiment())
    assert (outcome.status, outcome.rank) == (status, rank)
    assert outcome.advice


@pytest.mark.parametrize(
    ("message", "status", "advice"),
    [
        ("CUDA error: an illegal memory access was encountered", "crash", "dmesg"),
        (
            "CUDA error: no kernel image is available for execution on the device",
            "crash",
            "make doctor",
        ),
        (
            "The NVIDIA driver on your system is too old (found version 12020).",
            "crash",
            "make doctor",
        ),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "crash", "GPUS_IDS="),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "crash", "GPUS_IDS="),
        ("CUDA error: invalid device ordinal", "crash", "GPUS="),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "oom",
            "MBS=",
        ),
        (
            "NCCL error in: ProcessGroupNCCL.cpp:93, unhandled system error, ncclSystemError",
            "crash",
            "NCCL_DEBUG",
        ),
        (
            "Unexpected result nan (message='found NaN in local grad norm for bucket #0')",
            "nan",
            "--lr",
        ),
        ("No module named 'transformer_engine'", "crash", "make doctor"),
        ("[Errno 2] No such file or directory: '/data/x.idx'", "crash", "DATA="),
    ],
)
def test_named_errors_of_a_rank(message, status, advice):
    kinds = {"No module": "ModuleNotFoundError"}
    kind = next(
        (kind for start, kind in kinds.items() if message.startswith(start)), "RuntimeError"
    )
    outcome = classify(Evidence(exit_code=1, errors=(error(0, message, 1.0, kind),)), experiment())
    assert (outcome.status, outcome.rank) == (status, 0)
    assert advice in outcome.advice


def test_settings_that_upstream_refuses_are_told_by_where_they_are_refused():
    traceback = (
        'File "megatron/core/transformer/transformer_config.py", line 1200, in __post_init__'
    )
    refused = error(0, "num_layers: 5 must be divisible", 1.0, "ValueError", traceback)
    assert (
        classify(Evidence(exit_code=1, errors=(refused,)), experiment()).status
        == "bad-configuration"
    )


def test_a_mistake_that_the_entry_reports_is_a_bad_configuration():
    told = error(2, "no Megatron-LM found", 1.0, "UserError")
    for evidence in (
        {"errors": (told,)},
        {"log": "error: no Megatron-LM found\n" + SUMMARY.format(exitcode=2)},
    ):
        outcome = classify(Evidence(exit_code=1, **evidence), experiment())
        assert outcome.status == "bad-configuration"
        assert "no Megatron-LM found" in outcome.detail


@pytest.mark.parametrize(
    ("log", "status"), [("unknown_argument", "bad-configuration"), (None, "nan")]
)
def test_of_a_rank_that_exits_the_log_has_the_reason(log, status):
    text = captured(log) if log else NAN_RERUN + SUMMARY.format(exitcode=17)
    outcome = classify(
        Evidence(exit_code=1, log=text, errors=(error(1, "2", 1.0, "SystemExit"),)), experiment()
    )
    assert (outcome.status, outcome.rank) == (status, 1)
    assert "SystemExit" not in outcome.detail


@pytest.mark.parametrize(
    ("signum", "words"),
    [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "terminal")],
)
def test_a_run_that_was_stopped_is_killed_whatever_its_ranks_say(signum, words):
    evidence = Evidence(
        exit_code=1, errors=(error(0, "boom", 1.0),), metrics=metrics(3.0, 2.0), stopped_by=signum
    )
    outcome = classify(evidence, experiment())
    assert outcome.status == "killed"
    assert words in outcome.detail and "after step 2 of 20" in outcome.detail


def test_a_run_stopped_behind_the_launchers_back_is_killed_too():
    log = (
        "Traceback (most recent call last):\n  File\n"
        "torch.distributed.elastic.multiprocessing.api.SignalException: Process 7 got signal: 15\n"
    )
    assert classify(Evidence(exit_code=1, log=log), experiment()).status == "killed"


def test_a_loss_that_is_no_number_is_nan_even_where_the_run_ends_well():
    outcome = classify(
        Evidence(exit_code=0, metrics=metrics(3.0, float("nan"))), experiment(steps=2)
    )
    assert outcome.status == "nan" and "step 2" in outcome.detail and "--lr" in outcome.advice
    skipped = (StepMetrics(step=1, loss=3.0, step_ms=1, time=1, nan=1),)
    assert classify(Evidence(exit_code=0, metrics=skipped), experiment(steps=1)).status == "nan"


def test_a_hang_says_what_was_seen():
    outcome = classify(
        Evidence(exit_code=-15, hang="no step for 300 s", metrics=metrics(3.0)), experiment()
    )
    assert (
        outcome.status == "hang"
        and outcome.detail == "no step for 300 s"
        and "stacks" in outcome.advice
    )


def test_ok_needs_every_step():
    assert (
        classify(Evidence(exit_code=0, metrics=metrics(3.0, 2.0)), experiment(steps=2)).status
        == "ok"
    )
    early = classify(Evidence(exit_code=0, metrics=metrics(3.0, 2.0)), experiment(steps=3))
    assert early.status == "crash" and "after step 2 of 3" in early.detail


@pytest.mark.parametrize(("exit_code", "status", "detail"), [
    (127, "crash", "exit code 127"), (-9, "crash", "torchrun: ended by SIGKILL"), (-15, "killed", "torchrun: ended by SIGTERM"),
    (-40, "crash", "torchrun: ended by signal 40"),
])  # fmt: skip
def test_an_exit_without_any_other_evidence_is_named_by_its_code(exit_code, status, detail):
    outcome = classify(
        Evidence(exit_code=exit_code, log="bash: torchrun: command not found\n"), experiment()
    )
    assert (outcome.status, outcome.detail) == (status, detail)


def test_levers_fit_the_experiment():
    plain = memory_levers(experiment(mbs=4, gbs=8, dp=2))
    assert plain.endswith("try MBS=2 or SHARDING=optim or RECOMPUTE=full")
    split = memory_levers(experiment(mbs=1, gbs=2, dp=1, tp=2, recompute="full"))
    assert "SP=1" in split and "TP=4" in split and "MBS" not in split and "RECOMPUTE" not in split
    assert "TP=" not in memory_levers(experiment(mbs=1, gbs=2, dp=2, tp=4, sharding="optim")), (
        "4 heads, tp 8"
    )
    last = experiment(
        mbs=1,
        gbs=1,
        dp=1,
        tp=4,
        sp=True,
        pp=4,
        recompute="full",
        sharding="optim",
        optimizer_state="bf16",
    )
    assert memory_levers(last).endswith("try a smaller SEQ=")


def test_ranks_are_grouped_by_where_they_wait():
    waiting = """Thread 0x01 (most recent call first):
  File "/lib/threading.py", line 355 in wait

Current thread 0x02 (most recent call first):
  File "/lib/torch/distributed_c10d.py", line 3007 in all_reduce
  File "train.py", line 9 in step
"""
    stuck = """Thread 0x02 (most recent call first):
  File "train.py", line 3 in load
  File "train.py", line 9 in step
"""
    assert "; ".join(by_frame({0: waiting, 1: stuck, 2: waiting, 3: ""})) == (
        "ranks 0, 2 in all_reduce (distributed_c10d.py:3007); rank 1 in load (train.py:3)"
    )


@pytest.mark.parametrize(
    "log",
    [
        "IndexError: index out of range in self\n",
        "/aten/src/ATen/native/cuda/Indexing.cu:1553: indexSelectLargeIndex: block: [0,0,0] "
        "Assertion `srcIndex < srcSelectDimSize` failed.\nRuntimeError: CUDA error: device-side assert triggered\n",
        SUMMARY.format(exitcode=-7),
    ],
)
def test_what_damaged_data_does_to_a_run_names_the_data_and_its_check(log):
    outcome = classify(Evidence(exit_code=1, log=log), experiment(data="mine:0.7 other:0.3"))
    assert (
        outcome.status == "crash"
        and "make data-check NAME=mine and make data-check NAME=other" in outcome.advice
    )
    assert "data-check" not in classify(Evidence(exit_code=1, log=log), experiment()).advice
