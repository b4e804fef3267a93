"""Checkpoints on disk, judged and pruned without torch; and which of them a run begins with."""

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_files import Metadata, as_torch_pickles, write

from harness import cli
from harness.errors import UserError
from harness.experiment import command_line
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.launching.outcome import Evidence, classify
from harness.planning import resolved, starting_weights
from harness.planning.plan import Plan, plan
from harness.run import checkpoint_list, checkpoints, finding, schema, writing
from harness.run.checkpoints import Saving
from harness.run.directory import RunDir
from harness.run.schema import Result, StepMetrics, Validation
from harness.run.step_statistics import measure
from harness.system import locks
from harness.system.files import write_json

TINY = {"DEVICE": "cpu", "DATA": "mock", "STEPS": "20"}


def steps(folder: Path) -> list[int]:
    return [found.step for found in checkpoints.in_folder(folder)]


def run_in(
    outdir: Path, e, *, every: int = 5, result: str | None = None, folder: Path | None = None
) -> RunDir:
    run = writing.create(outdir, e.label)
    run.freeze_experiment(e, "cpu", None, Saving(every, 2, folder))
    metrics = [
        StepMetrics(step=n, loss=7 - n / 10, step_ms=1, time=0)
        for n in range(1, 21 if result else 13)
    ]
    run.metrics.write_text("".join(f"{m.model_dump_json()}\n" for m in metrics))
    if result:
        content = {
            "status": result,
            "exit_code": 0,
            "started": 0,
            "finished": 1,
            "steps": 20,
            "data": "mock",
            "device": "cpu",
        }
        write_json(
            run.result,
            Result.model_validate(content | measure(e, metrics, None)).model_dump(mode="json"),
        )
    return run


def tiny(**settings):
    return plan(load_catalog().find("101"), TINY | settings, "cpu").experiment


@pytest.mark.parametrize(
    "harm, damage",
    [
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (
            lambda path: (path / "__0_0.distcp").write_bytes(b"x" * 699),
            "__0_0.distcp has 699 bytes of 700",
        ),
        (
            lambda path: (path / ".metadata").write_bytes(b"\x80\x04garbage"),
            ".metadata is damaged (UnpicklingError)",
        ),
        (
            lambda path: (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:-40]),
            ".metadata is damaged",
        ),
        (lambda path: (path / ".metadata").unlink(), "it was not written to its end"),
        (lambda path: (path / "metadata.json").unlink(), "it was not written to its end"),
        (lambda path: (path / "metadata.json").write_text("{"), "metadata.json is damaged"),
    ],
)
def test_what_is_missing_or_damaged_is_named_and_the_one_before_is_taken(tmp_path, harm, damage):
    write(tmp_path, 10)
    harm(write(tmp_path, 20))
    told = []
    assert checkpoints.newest_whole(tmp_path, told.append).step == 10
    assert len(told) == 1 and told[0].startswith(f"checkpoint of step 20 skipped: {damage}")


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm, damage",
    [
        (
            lambda path: flip(path / "__0_0.distcp", 0),
            "__0_0.distcp: not the bytes that were saved (checksum)",
        ),
        (
            lambda path: flip(path / "__0_0.distcp", 699, 7),
            "__0_0.distcp: not the bytes that were saved (checksum)",
        ),
        (
            lambda path: (path / "__0_0.distcp").write_bytes(b"x" * 300 + bytes(400)),
            "__0_0.distcp: not the bytes that were saved",
        ),
        (
            lambda path: (path / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
            "metadata.json: not the bytes",
        ),
        (
            lambda path: (path / "integrity.json").write_bytes(b""),
            "integrity.json is not a JSON object (0 characters)",
        ),
        (
            lambda path: (path / "integrity.json").write_bytes(bytes(300)),
            "integrity.json is not a JSON object",
        ),
        (
            lambda path: (path / "integrity.json").write_text(
                '{"algorithm": "md5", "files": {"a": "b"}}'
            ),
            "integrity.json is damaged",
        ),
        (
            lambda path: (path / "integrity.json").write_text(
                '{"algorithm": "sha256", "files": {"metadata.json": "b"}}'
            ),
            "integrity.json does not know .metadata",
        ),
    ],
)
def test_bytes_that_changed_after_the_save_are_noticed_and_the_one_before_is_taken(
    tmp_path, harm, damage
):
    for step in (10, 20):
        checkpoints.settle(write(tmp_path, step))
    harm(tmp_path / "iter_0000020")
    told = []
    assert checkpoints.newest_whole(tmp_path, told.append).step == 10
    assert len(told) == 1 and told[0].startswith(f"checkpoint of step 20 skipped: {damage}")


def test_checksums_are_those_that_upstream_verifies(tmp_path):
    path = write(tmp_path, 1)
    checkpoints.settle(path)
    kept = json.loads((path / "integrity.json").read_text())
    assert kept["algorithm"] == "sha256" and set(kept["files"]) == {
        "__0_0.distcp",
        ".metadata",
        "metadata.json",
    }
    assert kept["files"]["__0_0.distcp"] == hashlib.sha256(b"x" * 700).hexdigest()


def test_a_checkpoint_without_checksums_is_taken_as_before(tmp_path):
    flip(write(tmp_path, 1) / "__0_0.distcp", 0)
    found = checkpoints.newest_whole(tmp_path)
    assert found.step == 1 and not found.has_checksums


@pytest.mark.parametrize(
    "keep, there, saves, at_once",
    [
        (None, 0, 4, 4),
        (2, 0, 9, 3),
        (2, 0, 2, 2),
        (1, 0, 9, 2),
        (2, 2, 5, 1),
        (2, 1, 5, 2),
        (2, 7, 5, 1),
    ],
)
def test_room_is_asked_for_as_many_checkpoints_as_lie_there_at_once(
    tmp_path, keep, there, saves, at_once
):
    for step in range(there):
        write(tmp_path, step + 1)
    size = 3 * 2**30
    checkpoints.check_room(Saving(5, keep, tmp_path), saves, size, at_once * size)
    with pytest.raises(
        UserError, match=rf"{at_once} checkpoints? of 3.00 GiB need {3 * at_once}.00 GiB"
    ) as refused:
        checkpoints.check_room(Saving(5, keep, tmp_path), saves, size, at_once * size - 1)
    assert ("KEEP=" in str(refused.value)) == (at_once > 2 and not there)
    assert "make clean" not in str(refused.value)


def test_the_keep_that_is_proposed_where_room_is_short_fits(tmp_path):
    with pytest.raises(UserError, match="KEEP=2, "):
        checkpoints.check_room(Saving(5, None, tmp_path), 9, 10, 35)
    checkpoints.check_room(Saving(5, 2, tmp_path), 9, 10, 35)
    with pytest.raises(UserError):
        checkpoints.check_room(Saving(5, 3, tmp_path), 9, 10, 35)


@pytest.fixture
def upstreams_reader(monkeypatch):
    """What the harness makes of upstream's ``read_metadata``."""
    from types import ModuleType, SimpleNamespace

    stub = SimpleNamespace(read_metadata=lambda tracker: (Path(tracker).read_text(), "read"))
    training = ModuleType("megatron.training")
    training.checkpointing = stub
    for name, module in (("megatron", ModuleType("megatron")), ("megatron.training", training)):
        monkeypatch.setitem(sys.modules, name, module)
    from harness.entry import checkpointing

    checkpointing._survive_a_bad_tracker()
    return stub.read_metadata


@pytest.mark.parametrize("torn", [b"", bytes(2), b"\xff\xfe", b"\n"])
def test_an_empty_or_torn_tracker_gives_way_to_the_newest_whole_checkpoint(
    tmp_path, upstreams_reader, capsys, torn
):
    for step in (10, 20, 30):
        checkpoints.settle(write(tmp_path, step))
    flip(tmp_path / "iter_0000030" / "__0_0.distcp", 5)
    tracker = tmp_path / checkpoints.TRACKER
    assert upstreams_reader(tracker) == ("30", "read")
    tracker.write_bytes(torn)
    assert upstreams_reader(tracker) == ("20", "read")
    assert "the newest whole checkpoint is iter_0000020" in capsys.readouterr().out
    tracker.write_bytes(b"soon")
    with pytest.raises(UserError, match="names no iteration: 'soon'"):
        upstreams_reader(tracker)
    tracker.write_bytes(torn)
    for step in (10, 20):
        flip(tmp_path / f"iter_{step:07d}" / "__0_0.distcp", 5)
    with pytest.raises(UserError, match="no checkpoint in its folder is complete"):
        upstreams_reader(tracker)


def test_a_pickle_is_read_and_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = write(tmp_path, 1)
    (path / ".metadata").write_bytes(as_torch_pickles(Metadata({"bomb": Bomb()}, {})))
    assert checkpoints.examine(path, 1).damage.startswith(
        ".metadata names __builtin__.getattr, which is not data"
    )
    assert not (tmp_path / "ran").exists()


def test_contents(tmp_path):
    found = checkpoints.examine(write(tmp_path, 5), 5)
    assert (
        found.damage is None
        and found.contents.parameters == 102400
        and found.contents.has_optimizer
    )
    assert not checkpoints.examine(write(tmp_path, 6, optimizer=False), 6).contents.has_optimizer


def test_pruning_keeps_the_newest_whole_ones(tmp_path):
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    (tmp_path / "iter_0000020" / "metadata.json").unlink()
    (tmp_path / "iter_0000050" / ".metadata").unlink()  # being written
    (tmp_path / ".removing-iter_0000005").mkdir()
    assert checkpoints.prune(tmp_path, keep=2) == [10, 20]
    assert steps(tmp_path) == [30, 40, 50] and not list(tmp_path.glob(".removing*"))
    assert checkpoints.prune(tmp_path, keep=1) == [30]
    (tmp_path / "iter_0000040" / "metadata.json").unlink()
    write(tmp_path, 35)
    assert checkpoints.prune(tmp_path, keep=1) == [] and 35 in steps(
        tmp_path
    )  # the only whole one, though not the newest


def test_finding_by_label_folder_and_step(tmp_path):
    e = tiny()
    run = run_in(tmp_path, e)
    write(run.checkpoints, 5)
    write(run.checkpoints, 10)
    run_in(tmp_path, tiny(STEPS="9"))  # keeps none
    for wanted, step in (
        (e.label, 10),
        (str(run.checkpoints), 10),
        (str(run.checkpoints / "iter_0000005"), 5),
    ):
        assert finding.checkpoint(wanted, tmp_path).step == step
    with pytest.raises(
        UserError,
        match=f"no folder and no run with a checkpoint is called nothing; valid: {e.label}$",
    ):
        finding.checkpoint("nothing", tmp_path)
    with pytest.raises(UserError, match="no whole checkpoint in"):
        finding.checkpoint(str(tmp_path), tmp_path)
    (run.checkpoints / "iter_0000005" / "__0_0.distcp").unlink()
    with pytest.raises(
        UserError,
        match=r"iter_0000005: __0_0.distcp is missing\nmake checkpoints lists those that are whole",
    ):
        finding.checkpoint(str(run.checkpoints / "iter_0000005"), tmp_path)


def test_weights_of_a_run_bring_its_model_on_sequences_as_long_as_it_has_positions_for(
    tmp_path, monkeypatch
):
    run = run_in(tmp_path, tiny(SEQ="64"))
    write(run.checkpoints, 5)
    e = load_catalog().find("101")
    started = resolved.with_settings(e, {"WEIGHTS": run.label}, tmp_path)
    assert (started.model, started.weights) == (tiny().model, str(run.checkpoints))
    assert (started.positions, started.seq_length, started.overrides) == (
        64,
        64,
        {"WEIGHTS": run.label},
    )
    assert (
        resolved.with_settings(with_changes(e, weights=run.label), {}, tmp_path).model
        == tiny().model
    )
    assert resolved.with_settings(e, {"WEIGHTS": run.label, "SEQ": "32"}, tmp_path).seq_length == 32
    assert e.seq_length == 1024, "given, although the row says the same"
    with pytest.raises(UserError, match="SEQ=1024: positions were learned up to 64"):
        resolved.with_settings(e, {"WEIGHTS": run.label, "SEQ": "1024"}, tmp_path)
    with pytest.raises(
        UserError, match=f"WEIGHTS=nothing: .*{run.label}\n.*make import-hf brings some"
    ):
        starting_weights.find("nothing", tmp_path)
    run.experiment_json.write_text("{")
    with pytest.raises(
        UserError, match=f"WEIGHTS={run.label}: experiment.json is not a JSON object"
    ):
        starting_weights.find(run.label, tmp_path)
    monkeypatch.setattr(
        starting_weights, "read_record", lambda folder: folder == run.path / "adapters"
    )
    with pytest.raises(UserError, match="this run trained adapters\nmake export-hf"):
        starting_weights.find(run.label, tmp_path)


def test_an_experiment_stands_for_its_newest_run_with_checkpoints(tmp_path):
    older, newer, empty = (
        run_in(tmp_path, tiny(**settings)) for settings in ({}, {}, {"LR": "2e-3"})
    )
    for age, run in enumerate((empty, newer, older)):
        os.utime(run.experiment_json, (1e9 - age, 1e9 - age))
    for run in (older, newer):
        write(run.checkpoints, 5)
    for wanted in ("101", tiny().name):
        assert finding.checkpoint(wanted, tmp_path).path.parent == newer.checkpoints
    assert finding.checkpoint(older.label, tmp_path).path.parent == older.checkpoints
    write(empty.checkpoints, 5)
    for wanted in ("101", tiny().name):
        with pytest.raises(
            UserError, match=f"{wanted}: 2 different experiments ran under this id:"
        ) as refused:
            finding.checkpoint(wanted, tmp_path)
    assert f"  {empty.label}\n  {newer.label}  (LR 6e-05; MIN_LR 6e-06; " in str(refused.value)
    with pytest.raises(
        UserError, match="no folder and no run with a checkpoint is called 111; valid: 101"
    ):
        finding.checkpoint("111", tmp_path)


def test_another_model_is_refused_with_both_sizes(tmp_path):
    run = run_in(tmp_path, tiny())
    write(run.checkpoints, 5)
    with pytest.raises(
        UserError,
        match="holds another model: hidden_size 100, num_attention_heads 25 there, hidden_size 64, num_attention_heads 16 in 211-",
    ):
        plan(load_catalog().find("211"), TINY | {"LOAD": run.label, "OUTDIR": str(tmp_path)}, "cpu")
    bare = write(tmp_path / "bare", 5, width=96).parent
    with pytest.raises(
        UserError, match="holds another model: hidden_size 96 there, hidden_size 100 in 101-"
    ):
        plan(load_catalog().find("101"), TINY | {"LOAD": str(bare), "OUTDIR": str(tmp_path)}, "cpu")


def test_an_optimizer_of_other_rates_is_refused(tmp_path):
    """Upstream would crash: ``Could not find parameter group with key (None, 6e-05, …)``."""
    run = run_in(tmp_path, tiny(LR="3e-4"))
    write(run.checkpoints, 5)

    def load(**settings: str) -> int:
        return plan(
            load_catalog().find("101"),
            TINY | {"LOAD": run.label, "OUTDIR": str(tmp_path)} | settings,
            "cpu",
        ).first_step

    with pytest.raises(
        UserError,
        match=r"was trained with LR=0.0003 MIN_LR=3e-05, 101-.* has LR=6e-05 MIN_LR=6e-06\n.*--no-load-optim",
    ):
        load()
    assert load(LR="0.0003", MIN_LR="3e-05") == load(ARGS="--no-load-optim") == 5


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"SAVE": "0", "KEEP": "2"}, "SAVE=0 keeps no checkpoints, but KEEP is given"),
        ({"SAVE_EVERY": "0"}, "SAVE_EVERY=0: expected a whole number, 1 or more"),
        ({"KEEP": "x"}, "KEEP=x: expected a whole number"),
        ({"RESUME": "yes"}, "RESUME=yes: expected 0, 1 or auto"),
        ({"RESUME": "1"}, "RESUME=1: there is no run 101-"),
        (
            {"LOAD": "nothing"},
            "no folder and no run with a checkpoint is called nothing; SAVE=1 .*: make <id> SAVE=1",
        ),
        (
            {"LOAD": "101-gpt2"},
            "is called 101-gpt2; SAVE=1 makes a run keep checkpoints: make 101 SAVE=1",
        ),
        ({"NODE_RANK": "1"}, "NODE_RANK=1: 101 runs on nodes 0 to 0; NODES= sets"),
        ({"WANDB": "on"}, "WANDB=on: expected offline or online"),
        (
            {"WANDB_PROJECT": "mine"},
            "WANDB_PROJECT=mine logs nothing without WANDB=\nadd WANDB=offline or WANDB=online",
        ),
        (
            {"WANDB_NAME": "a", "WANDB_ENTITY": "b"},
            "WANDB_ENTITY=b WANDB_NAME=a logs nothing without WANDB=",
        ),
        ({"LR": "fast"}, "LR=fast: expected a number"),
        ({"LR": "1e-5", "MIN_LR": "1e-4"}, "min_lr 0.0001 must not be above lr 1e-05"),
        ({"LR_WARMUP": "20", "LR": "1e-3"}, "lr_warmup_steps 20 must be below the 20 steps"),
        ({"UNTIL": "0"}, "UNTIL=0: no loss ever reaches 0"),
        ({"EVAL_EVERY": "0"}, "EVAL_EVERY=0: expected"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, settings, said):
    with pytest.raises(UserError, match=said):
        plan(load_catalog().find("101"), TINY | settings | {"OUTDIR": str(tmp_path)}, "cpu")


def test_megatron_fsdp_waits_for_its_saves_and_a_cpu_has_none(tmp_path):
    from harness.upstreams.megatron_lm.flags import saving_flags

    fsdp, fsdp2 = (load_catalog().find(name) for name in ("705", "706"))
    assert saving_flags(fsdp, Saving(5, None, None)) == [
        *("--save-interval", "5"),
        *("--exit-signal-handler", "--exit-signal", "SIGUSR2"),
    ]
    assert "--async-save" in saving_flags(fsdp2, Saving(5, None, None))
    with pytest.raises(UserError, match="705: Megatron-FSDP saves on GPUs only"):
        plan(fsdp, {"SAVE": "1", "OUTDIR": str(tmp_path)}, "cpu")
    assert plan(fsdp2, {"SAVE": "1", "OUTDIR": str(tmp_path)}, "cpu").extras.saving


def test_saving_and_evaluating_as_asked(tmp_path):
    asked = {
        "SAVE_EVERY": "5",
        "KEEP": "3",
        "EVAL_EVERY": "7",
        "EVAL_STEPS": "2",
        "LR": "3e-4",
        "OUTDIR": str(tmp_path),
    }
    asked |= {"WANDB": "offline", "WANDB_ENTITY": "team", "LR_WARMUP": "4"}
    script = plan(load_catalog().find("122"), TINY | asked, "cpu").script()
    for words in (
        "--save-interval 5 --async-save --use-persistent-ckpt-worker --async-strategy mcore",
        '${HARNESS_RUN_DIR:+--save "$HARNESS_RUN_DIR/checkpoints"}',
        "--wandb-project megatron --wandb-exp-name 122-",
        "--wandb-entity team",
        "--dist-ckpt-optim-fully-reshardable",
        "export HARNESS_KEEP=3",
        "--eval-interval 7 --eval-iters 2",
        "--lr 0.0003 --min-lr 3e-05",
        "--lr-warmup-iters 4",
    ):
        assert words in script.replace(" \\\n   ", "")
    plain = plan(load_catalog().find("122"), TINY | {"OUTDIR": str(tmp_path)}, "cpu").script()
    assert "--save" not in plain and "wandb" not in plain
    folder = plan(
        load_catalog().find("122"),
        TINY | {"OUTDIR": str(tmp_path), "SAVE": str(tmp_path / "kept")},
        "cpu",
    ).script()
    assert (
        f"--save {tmp_path}/kept --save-interval 20" in folder.replace(" \\\n   ", "")
        and "/checkpoints" not in folder
    )


def test_saving_does_not_change_what_a_run_is_called(tmp_path):
    assert tiny(SAVE="1", SAVE_EVERY="5", KEEP="1", WANDB="offline").label == tiny().label
    assert "lr3e-4" in tiny(LR="3e-4").label


def test_without_intervals_there_is_one_checkpoint_at_the_end(tmp_path):
    planned = plan(load_catalog().find("101"), TINY | {"SAVE": "1", "OUTDIR": str(tmp_path)}, "cpu")
    assert planned.extras.saving == Saving(20, None)


def test_a_folder_with_checkpoints_is_not_mixed_with_another_run(tmp_path):
    write(tmp_path / "kept", 30)
    with pytest.raises(UserError, match="already holds checkpoints, the newest of step 30"):
        plan(
            load_catalog().find("101"),
            TINY | {"SAVE": str(tmp_path / "kept"), "OUTDIR": str(tmp_path)},
            "cpu",
        )


def test_resuming_takes_the_newest_whole_checkpoint_and_the_settings_of_before(tmp_path):
    e = tiny()
    run = run_in(tmp_path, e)
    write(run.checkpoints, 5)
    (write(run.checkpoints, 10) / "__0_0.distcp").unlink()
    planned = plan(
        load_catalog().find("101"), TINY | {"RESUME": "1", "OUTDIR": str(tmp_path)}, "cpu"
    )
    assert (planned.resumes, planned.first_step) == (run, 5) and planned.extras.saving == Saving(
        5, 2
    )
    assert planned.notices == ("checkpoint of step 10 skipped: __0_0.distcp is missing",)
    assert "--ckpt-step 5" in planned.script()


def test_resuming_with_another_model_names_the_difference_and_with_another_dropout_resumes(
    tmp_path,
):
    e = tiny()
    run = run_in(tmp_path, e)
    write(run.checkpoints, 5)
    asked = TINY | {"RESUME": "1", "OUTDIR": str(tmp_path)}
    row = load_catalog().find("101")
    other = with_changes(
        row, model=row.model.model_copy(update={"add_bias_linear": False, "dropout": 0.0})
    )
    with pytest.raises(
        UserError,
        match=f"{run.label} holds another model: add_bias_linear True there, add_bias_linear False in 101-",
    ):
        plan(other, asked, "cpu")
    same = with_changes(row, model=row.model.model_copy(update={"dropout": 0.0}))
    with pytest.raises(
        UserError, match=r"ran with other settings, which change its losses:\n  DROPOUT 0.1 -> 0\n"
    ):
        plan(same, asked, "cpu")
    planned = plan(same, asked | {"FORCE": "1"}, "cpu")
    assert planned.first_step == 5 and planned.notices == (
        "DROPOUT was 0.1 and is 0 from step 6 on: FORCE=1",
    )
    write_json(run.experiment_json, json.loads(run.experiment_json.read_text()) | {"data": "gone"})
    with pytest.raises(
        UserError,
        match='change its losses:\n  DATA gone -> mock\nDATA="gone" resumes on the same data\n',
    ):
        plan(row, asked, "cpu")


def still_running(run):
    locks.take(run.path)


@pytest.mark.parametrize("made, said", [
    (still_running, r"RESUME=1: 101-\S+ still runs: process \d+ on \S+ has it\nmake stop RUN=101-"),
    (lambda run: run.experiment_json.write_text("{"), "RESUME=1: .*experiment.json is not a JSON object"),
    (lambda run: run.freeze_experiment(tiny(), "cpu", None), "kept no checkpoints, there is nothing to resume from\nstart anew with SAVE=1"),
])  # fmt: skip
def test_what_cannot_be_resumed_says_why(tmp_path, made, said):
    made(run_in(tmp_path, tiny()))
    with pytest.raises(UserError, match=said):
        plan(load_catalog().find("101"), TINY | {"RESUME": "1", "OUTDIR": str(tmp_path)}, "cpu")


def test_resuming_cuts_what_the_checkpoint_does_not_know_of(tmp_path):
    run = run_in(tmp_path, tiny())
    run.logs.write_text("first\n")
    (run.ranks / "0.error.json").write_text("{}")
    run.validation.write_text(
        "".join(
            Validation(step=s, split="validation", loss=1, time=0).model_dump_json() + "\n"
            for s in (4, 8)
        )
    )
    writing.prepare_to_resume(run, 5)
    assert [m.step for m in run.read_metrics()] == [1, 2, 3, 4, 5] and [
        v.step for v in run.read_validation()
    ] == [4]
    assert (
        (run.path / "logs.1.txt").read_text() == "first\n"
        and not run.logs.exists()
        and not list(run.ranks.iterdir())
    )


def test_the_newest_of_several_runs_with_checkpoints_is_resumed_else_the_newest(tmp_path):
    e = tiny()
    first, second = run_in(tmp_path, e), run_in(tmp_path, e)

    def resumed() -> Plan:
        return plan(
            load_catalog().find("101"), TINY | {"RESUME": "1", "OUTDIR": str(tmp_path)}, "cpu"
        )

    assert resumed().resumes == second and resumed().first_step == 0
    assert "was ended before its first checkpoint: it begins anew" in resumed().notices[0]
    write(first.checkpoints, 5)
    assert (resumed().resumes, resumed().first_step, resumed().notices) == (first, 5, ())
    write(second.checkpoints, 10)
    assert (resumed().resumes, resumed().first_step) == (second, 10)


def test_a_run_that_is_at_its_end_is_shown_and_not_trained_again(tmp_path, capsys):
    from harness import cli

    run = run_in(tmp_path, tiny(), result="ok")
    write(run.checkpoints, 20)
    assert (
        cli.main(
            ["run", "101", *(f"{k}={v}" for k, v in TINY.items()), "RESUME=1", f"OUTDIR={tmp_path}"]
        )
        == 0
    )
    assert f"{run.label}: ok, 20 of 20 steps" in capsys.readouterr().out
    with pytest.raises(UserError, match="step 20, and STEPS=20: nothing is left"):
        plan(load_catalog().find("101"), TINY | {"LOAD": run.label, "OUTDIR": str(tmp_path)}, "cpu")


def test_a_run_at_its_end_says_which_checkpoint_is_damaged_and_which_is_whole(tmp_path, capsys):
    from harness import cli

    run = run_in(tmp_path, tiny(), result="ok")
    write(run.checkpoints, 10)
    write(run.checkpoints, 15)
    last = write(run.checkpoints, 20)
    words = ["run", "101", *(f"{k}={v}" for k, v in TINY.items()), "RESUME=1", f"OUTDIR={tmp_path}"]
    assert cli.main(words) == 0 and "checkpoint" not in capsys.readouterr().out
    (last / "__0_0.distcp").write_bytes(b"half")
    assert cli.main(words) == 0
    assert capsys.readouterr().out.endswith(
        "  checkpoint of step 20 is damaged: __0_0.distcp has 4 bytes of 700\n"
        f"  the newest whole one is of step 15: LOAD={run.label} begins a new run with it\n"
    )
    assert (
        plan(
            load_catalog().find("101"), TINY | {"LOAD": run.label, "OUTDIR": str(tmp_path)}, "cpu"
        ).first_step
        == 15
    )
    for step in (10, 15):
        (run.checkpoints / f"iter_{step:07d}" / ".metadata").unlink()
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "step 10 is damaged: it was not written to its end" in said and said.endswith(
        "none is whole: SAVE=1 without RESUME= trains anew\n"
    )


def test_a_name_in_weights_comes_before_a_folder_of_that_name_in_a_run_and_in_generate(
    tmp_path, monkeypatch
):
    from harness import generate
    from harness.convert import weights

    def imported(folder: Path, positions: int) -> Path:
        write(folder, 5)
        model = load_catalog().find("101").model
        known = weights.Weights(
            name=folder.name,
            source="x",
            architecture="GPT2LMHeadModel",
            model=model,
            positions=positions,
            padded_vocab_size=51200,
            parameters=1,
            bytes=1,
            dtypes=("float32",),
            dequantized=0,
            tokenizer=True,
            flags=(),
        )
        write_json(folder / weights.RECORD, known.model_dump(mode="json"))
        return folder

    def both(named: str) -> set:
        asked = generate.parse({"WEIGHTS": named, "PROMPT": "a"}, tmp_path / "outdir")
        found = starting_weights.find(named, tmp_path / "outdir")
        return {
            (Path(found.folder), found.positions),
            (asked.checkpoint.path.parent, asked.experiment.positions),
        }

    monkeypatch.setattr(weights, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder = imported(tmp_path / "here" / "mine", 32)
    assert both("mine") == both(str(folder)) == {(folder, 32)}
    kept = imported(tmp_path / "weights" / "mine", 64)
    assert both("mine") == {(kept, 64)} and both("./mine") == both(str(folder)) == {(folder, 32)}
    for said in (
        lambda: starting_weights.find("mime", tmp_path),
        lambda: generate.parse({"WEIGHTS": "mime", "PROMPT": "a"}, tmp_path),
    ):
        with pytest.raises(
            UserError, match="WEIGHTS=mime: did you mean mine\\?\nmake import-hf brings some"
        ):
            said()


def test_weights_alone_start_at_step_0(tmp_path):
    run = run_in(tmp_path, tiny())
    write(run.checkpoints, 20, optimizer=False)
    planned = plan(
        load_catalog().find("101"), TINY | {"LOAD": run.label, "OUTDIR": str(tmp_path)}, "cpu"
    )
    assert (
        planned.first_step == 0 and "--finetune --no-load-optim --no-load-rng" in planned.script()
    )


def test_the_list(tmp_path, capsys):
    run = run_in(tmp_path, tiny())
    checkpoints.settle(write(run.checkpoints, 5))
    (write(run.checkpoints, 10) / ".metadata").unlink()
    checkpoints.settle(write(run.checkpoints, 15, optimizer=False))
    run_in(tmp_path, tiny(STEPS="9"))  # keeps none
    assert checkpoint_list.print_list(tmp_path, None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == run.label and lines[2].split() == [
        "5",
        "0.000",
        "102,400",
        "6.5000",
        "whole",
    ]
    assert lines[3].endswith("it was not written to its end")
    assert (
        lines[4].split(maxsplit=3) == ["15", "0.000", "102,400", "whole, weights only"]
        and len(lines) == 5
    )
    assert checkpoint_list.print_list(tmp_path / "empty", None) == 1


def test_the_list_tells_flipped_bits_what_has_no_checksums_and_what_was_not_read(tmp_path, capsys):
    for step in (5, 10):
        checkpoints.settle(write(tmp_path / "kept", step))
    write(tmp_path / "kept", 15)
    flip(tmp_path / "kept" / "iter_0000010" / "__0_0.distcp", 699)

    def states(**settings: str) -> list[str]:
        words = [
            "checkpoints",
            f"RUN={tmp_path / 'kept'}",
            *(f"{key}={value}" for key, value in settings.items()),
        ]
        assert cli.main(words) == 0
        return [
            line.split("102,400")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]
        ]

    changed, plain = (
        "__0_0.distcp: not the bytes that were saved (checksum)",
        "whole, saved without checksums",
    )
    assert states() == states(VERIFY="1") == ["whole", changed, plain]
    unread = "whole, checksums not compared (VERIFY=1)"
    assert states(VERIFY="0") == [unread, unread, plain]
    assert cli.main(["checkpoints", "VERIFY=yes"]) == 2


@pytest.mark.parametrize("losses, done, status", [
    ((4.0, 2.9), 12, "ok"), ((4.0, 3.1), 20, "target-missed"), ((), 12, "crash"), ((), 20, "ok"),
])  # fmt: skip
def test_a_run_to_a_loss_ends_well_only_where_it_got_there_or_never_looked(losses, done, status):
    e = plan(
        load_catalog().find("604"), {"DEVICE": "cpu", "UNTIL": "3", "STEPS": "20"}, "cpu"
    ).experiment
    metrics = tuple(StepMetrics(step=n, loss=4.0, step_ms=1, time=0) for n in range(1, done + 1))
    validation = tuple(
        Validation(step=6 * n, split="validation", loss=loss, time=0)
        for n, loss in enumerate(losses, 1)
    )
    assert classify(Evidence(0, metrics=metrics, validation=validation), e).status == status


def test_a_loss_on_the_test_set_is_not_the_one_to_reach():
    e = plan(
        load_catalog().find("604"), {"DEVICE": "cpu", "UNTIL": "3", "STEPS": "20"}, "cpu"
    ).experiment
    metrics = tuple(StepMetrics(step=n, loss=4.0, step_ms=1, time=0) for n in range(1, 21))
    seen = tuple(
        Validation(step=20, split=split, loss=loss, time=0)
        for split, loss in (("validation", 3.1), ("test", 2.9))
    )
    found = classify(Evidence(0, metrics=metrics, validation=seen), e)
    assert found.status == "target-missed" and found.detail.startswith("loss 3.1000")


def test_a_long_run_scales_its_intervals_in_its_miniature():
    e = plan(load_catalog().find("604"), {"DEVICE": "cpu"}, "cpu").experiment
    assert (e.steps, e.eval_interval, e.save_every, e.keep, e.data) == (240, 12, 30, 2, "mock")
    assert e.until.validation_loss == e.until.miniature_loss
    assert (
        plan(
            load_catalog().find("604"), {"DEVICE": "cpu", "EVAL_EVERY": "7"}, "cpu"
        ).experiment.eval_interval
        == 7
    )


def test_every_setting_is_read():
    known = {setting.key for setting in command_line.SETTINGS}
    assert {
        "SAVE",
        "SAVE_EVERY",
        "KEEP",
        "LOAD",
        "RESUME",
        "EVAL_EVERY",
        "EVAL_STEPS",
        "WANDB",
        "UNTIL",
        "LR",
    } <= known


def test_a_table_shows_the_held_out_loss_and_its_perplexity(tmp_path):
    from harness.evidence import columns, compare, tables
    from harness.evidence.references import load_references
    from harness.evidence.results import collect_runs

    run = run_in(tmp_path, tiny(UNTIL="3"), result="ok")
    result = json.loads(run.result.read_text()) | {
        "validation": {"step": 20, "split": "validation", "loss": 2.0, "time": 0}
    }
    write_json(run.result, result)
    (row,) = collect_runs(tmp_path, load_references()).rows
    values = columns.values(row)
    assert (values["validation_loss"], values["validation_step"]) == (2.0, 20) and values[
        "perplexity"
    ] == pytest.approx(7.389, abs=1e-3)
    assert schema.perplexity(1000.0) is None
    assert "2.000 (7.4)" in tables.render([row]) and "perplexity" in compare.render_compare(
        row, row
    )


def test_weights_are_read_to_their_end_before_a_run_starts_from_them(tmp_path):
    for step in (10, 20):
        checkpoints.settle(write(tmp_path, step))
    starting_weights.check_whole(str(tmp_path))
    flip(tmp_path / "iter_0000020" / "__0_0.distcp", 600)
    with pytest.raises(
        UserError,
        match=r"iter_0000020: __0_0.distcp: not the bytes [^\n]*\niter_0000010 is whole: write 10 into",
    ):
        starting_weights.check_whole(str(tmp_path))
    (tmp_path / checkpoints.TRACKER).write_text("10")
    starting_weights.check_whole(str(tmp_path))
    (tmp_path / checkpoints.TRACKER).write_text("")
    starting_weights.check_whole(str(tmp_path))
    flip(tmp_path / "iter_0000010" / "__0_0.distcp", 600)
    with pytest.raises(UserError, match=f"no whole checkpoint in {tmp_path}"):
        starting_weights.check_whole(str(tmp_path))
