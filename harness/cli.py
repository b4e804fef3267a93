"""The commands behind the Makefile's targets: ``python -m harness COMMAND [ID] [KEY=VALUE …]``."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from textwrap import indent

from harness import ROOT, tutorial
from harness.data import data_sets
from harness.data.sources import Definition, definitions
from harness.errors import UserError, nearest
from harness.experiment import identity, overrides
from harness.experiment.catalog import Catalog, load_catalog
from harness.experiment.experiment import Experiment
from harness.planning.plan import Plan, choose_device, plan
from harness.run import finding
from harness.system import masking, screen
from harness.system.streams import lasting_output
from harness.upstreams.megatron_lm import tracking

OUTDIR = ROOT / "outdir"
RECORDS = ROOT / "experiments" / "records"


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status: 0 done, 1 a run failed, 2 a mistake to mend, 130
    interrupted."""
    words = sys.argv[1:] if argv is None else argv
    # the output of a live view is all that it does
    output = nullcontext() if words[:1] == ["monitor-gpu"] else lasting_output()
    with output:
        return _main(words)


def _main(words: list[str]) -> int:
    try:
        name, *words = given(words) or ["list"]
        if name not in COMMANDS:
            raise UserError(f"unknown command {name}; {nearest(name, COMMANDS)}")
        return COMMANDS[name](words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"error: too long for the name of a file: {error.filename}", file=sys.stderr)
            return 2
        if not isinstance(error, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def given(words: Sequence[str]) -> list[str]:
    """``words``, where those behind ``--given`` are names of settings left in the environment by
    make, as KEY=VALUE.

    The Makefile passes values so: in the text of a recipe, a shell would read them. Secrets of
    ARGS= are hidden.
    """
    at = words.index("--given") if "--given" in words else len(words)
    found = [*words[:at], *(f"{name}={os.environ.get(name, '')}" for name in words[at + 1 :])]
    os.environ.pop("ARGS", None)
    return [
        f"ARGS={masking.hide(word[5:])}" if word.startswith("ARGS=") else word for word in found
    ]


def _run(words: list[str]) -> int:
    from harness.launching.rendezvous.handshake import refusals_sent

    with refusals_sent(words):
        return _run_here(words)


def _run_here(words: list[str]) -> int:
    e, settings = _experiment(words)
    if settings.get("SLURM") == "1":
        return _slurm(e, settings)
    _keep_gpus_awake()
    dry_run = settings.get("DRY_RUN") == "1"
    if not dry_run:
        _prepare_conversations([e], settings)
    planned = plan(e, settings, choose_device(settings, only_show=dry_run))
    if dry_run:
        return _print_script(planned, settings)
    if (status := _finished_before(planned)) is not None:
        return status
    from harness.launching.chapter import as_published
    from harness.launching.launch import run_plan

    _install_heavy(*(["tracking"] if planned.extras.tracking else []))
    if planned.extras.tracking:
        tracking.check(planned.extras.tracking)
    finished = run_plan(planned, hang_seconds=overrides.count_in(settings, "HANG"))
    if planned.experiment.profile and finished.result.status == "ok":
        from harness.profiling.profile import tell

        tell(finished.dir)
    if finished.result.status == "oom" and as_published(finished):
        print(
            f"  reproduced: the published {planned.experiment.half_of or 'run'} ran out of"
            " memory too"
        )
        return 0
    return finished.exit_status


def _train(words: list[str]) -> int:
    """A long run: the same words begin it, go on with it after an interruption, and show its end
    once it is there."""
    e, settings = _experiment(words)
    if e.until is None:
        raise UserError(
            f"{e.id} has no validation loss to train to\ngive one, UNTIL=3.2, or make {e.id} trains"
            " STEPS="
        )
    settings = {"SAVE": "1", **settings}
    device = choose_device(settings)
    planned = plan(
        e, {key: value for key, value in settings.items() if key not in ("SAVE", "RESUME")}, device
    )
    there, _ = finding.candidates(planned.outdir, e.id)
    if any(
        run.device == device and identity.same(run.experiment, planned.experiment) for run in there
    ):
        settings.setdefault("RESUME", "1")
    return _run([e.id, *(f"{key}={value}" for key, value in settings.items())])


def _finished_before(planned: Plan) -> int | None:
    """Show the result of a run that RESUME=1 finds at its end, and return its exit status; None
    where it is not."""
    from harness.launching.active_run import Finished
    from harness.launching.terminal import summary
    from harness.planning.resume import damaged_at_the_end
    from harness.planning.resumed import at_its_end

    run = planned.resumes
    if run is None or not at_its_end(run, planned.experiment):
        return None
    result = run.read_result()
    print(summary(run.label, run.path, result))
    if damaged := damaged_at_the_end(run):
        print(indent(damaged, "  "))
    return Finished(run, result).exit_status


def _checkpoints(words: list[str]) -> int:
    from harness.planning.resume import print_list
    from harness.run.checkpoints import LARGE_BYTES

    settings = overrides.parse(words, extra=("RUN", "VERIFY"))
    read = {"0": 0.0, "1": math.inf}.get(settings.get("VERIFY"), LARGE_BYTES)
    return print_list(_outdir(settings), settings.get("RUN"), read)


def _generate(words: list[str]) -> int:
    from harness import generate

    settings = overrides.parse(words, extra=generate.SETTINGS)
    request = generate.parse(settings, _outdir(settings))
    _install_heavy()
    return generate.generate(request, choose_device(settings))


def _show(words: list[str]) -> int:
    e, settings = _experiment(words)
    device = choose_device(settings, only_show=True)
    status = _print_script(
        plan(e, {"RENDEZVOUS": "first-node:29500", **settings}, device), settings
    )
    if device == "cpu" and "DEVICE" not in settings:
        print(
            f"# This is what runs here, without a GPU. At full size: make show-{e.id} DEVICE=cuda",
            file=sys.stderr,
        )
    return status


def _print_script(planned: Plan, settings: Mapping[str, str]) -> int:
    print(planned.script(), end="")
    wanted = planned.full.published_data
    if (
        planned.full.data == data_sets.MOCK
        and "DATA" not in settings
        and wanted in _conversations()
    ):
        print(
            f"# On mock data, for {wanted} is not prepared yet; make {planned.full.id} does that"
            " first.",
            file=sys.stderr,
        )
    return 0


def _conversations() -> dict[str, Definition]:
    """The conversations that are made from a file of the repository, by name."""
    return {name: known for name, known in definitions().items() if known.chat}


def _prepare_conversations(experiments: Sequence[Experiment], settings: Mapping[str, str]) -> None:
    """Prepare what is to be learned, where that is made here in seconds; a run on mock data would
    learn nothing."""
    known = _conversations()
    wanted = dict.fromkeys(settings.get("DATA", e.published_data) for e in experiments)
    if missing := [name for name in wanted if name in known and name not in data_sets.prepared()]:
        _install_heavy()
        from harness.data.chat.prepare import prepare_known

        for name in missing:
            prepare_known(known[name])


def _slurm(e: Experiment, settings: Mapping[str, str]) -> int:
    from harness.launching import slurm

    if settings.get("DEVICE", "cuda") != "cuda":
        raise UserError(
            f"SLURM=1 DEVICE={settings['DEVICE']}: jobs run on GPUs; leave DEVICE= out, or SLURM=1:"
            f" make {e.id} DEVICE=cpu runs here"
        )
    planned = plan(e, {**settings, "DEVICE": "cuda"}, "cuda")
    return slurm.submit_or_print(planned, settings)


def _chapter(words: list[str]) -> int:
    number, *rest = words or [""]
    settings = _settings(rest)
    experiments = load_catalog().in_chapter(overrides.count("chapter", number))
    if whole := [key for key in ("DRY_RUN", "SLURM", "RESUME") if settings.get(key, "0") != "0"]:
        raise UserError(
            f"{whole[0]}=1 is for one experiment: make {experiments[0].id} {whole[0]}=1\n"
            f"make list CHAPTER={number} shows what this one runs"
        )
    _keep_gpus_awake()
    device = choose_device(settings)
    _prepare_conversations(experiments, settings)
    from harness.launching.chapter import run_chapter

    _install_heavy()
    return run_chapter(
        experiments,
        lambda e: plan(e, settings, device),
        pack=settings.get("PACK") != "0",
        force=settings.get("FORCE") == "1",
        hang_seconds=overrides.count_in(settings, "HANG"),
    )


def _list(words: list[str]) -> int:
    settings = overrides.parse(words, extra=("CHAPTER", "MODEL"))
    catalog = load_catalog()
    wanted = [e for e in catalog.experiments if _matches(e, settings, catalog)]
    if not wanted:
        raise UserError(
            "no experiment matches " + " ".join(f"{k}={v}" for k, v in settings.items())
        )
    width, layouts = max(len(e.name) for e in wanted), max(len(e.layout) for e in wanted)
    for number, title in catalog.chapters.items():
        rows = [e for e in wanted if e.chapter == number]
        if rows:
            print(f"\n{number}  {title}")
        for e in rows:
            gpus = f"{e.world_size} GPU{'s' if e.world_size > 1 else ' '}"
            row = f"  {e.name:{width}}  {gpus:>7}  {e.layout:{layouts}}"
            if screen.width(piped=1000) < len(row) + 40:  # too narrow for another column
                screen.say(row.rstrip(), hang=6)
                screen.say(f"      {e.shows}", hang=6)
            else:
                screen.say(f"{row}  {e.shows}", hang=len(row) + 2)
    print()
    screen.say(
        f"{len(wanted)} experiments. make {wanted[0].id} runs one, make show-{wanted[0].id} prints"
        " its command."
    )
    return 0


def _matches(e: Experiment, settings: Mapping[str, str], catalog: Catalog) -> bool:
    if "CHAPTER" in settings:
        chapter = overrides.count("CHAPTER", settings["CHAPTER"])
        catalog.in_chapter(chapter)
        if e.chapter != chapter:
            return False
    if "MODEL" in settings:
        models = sorted({x.model.name for x in catalog.experiments})
        if not any(settings["MODEL"] in model for model in models):
            raise UserError(f"MODEL={settings['MODEL']}; {nearest(settings['MODEL'], models)}")
        if settings["MODEL"] not in e.model.name:
            return False
    return "GPUS" not in settings or e.world_size <= overrides.count("GPUS", settings["GPUS"])


def _table(words: list[str]) -> int:
    from harness.evidence import tables

    settings = overrides.parse(words, extra=("CHAPTER", "FORMAT", "ID", "HARDWARE", "AGAINST"))
    return tables.print_table(_outdir(settings), RECORDS, settings)


def _compare(words: list[str]) -> int:
    from harness.evidence import compare

    settings = overrides.parse(words, extra=("A", "B", "FORMAT"))
    overrides.require(settings, "AB", "make compare A=101 B=111 (ids, names or labels in outdir/)")
    return compare.print_compare(_outdir(settings), RECORDS, settings)


def _doctor(words: list[str]) -> int:
    from harness.doctor import doctor

    return doctor()


def _arguments(words: list[str]) -> int:
    from harness.upstreams.megatron_lm.arguments import print_arguments

    _install_heavy()
    return print_arguments(overrides.parse(words, extra=("MATCH",)).get("MATCH"))


def _parity(words: list[str]) -> int:
    _install_heavy()
    from harness.parity import main as parity

    return parity()


def _monitor_gpu(words: list[str]) -> int:
    from harness.machine.gpus import monitor

    return monitor()


def _stop(words: list[str]) -> int:
    from harness.launching.stop import stop

    settings = overrides.parse(words, extra=("RUN",))
    return stop(_outdir(settings), settings.get("RUN"))


def _record(words: list[str]) -> int:
    from harness.evidence.records import record
    from harness.run.directory import RunDir

    settings = overrides.parse(words, extra=("RUN",))
    overrides.require(settings, ["RUN"], "make record RUN=label (a folder in outdir/), or an id")
    label = finding.label_of(settings["RUN"], _outdir(settings), lambda run: run.device == "cuda")
    print(record(RunDir(_outdir(settings) / label), RECORDS, force=settings.get("FORCE") == "1"))
    return 0


def _profile(words: list[str]) -> int:
    from harness.profiling.profile import print_profile

    settings = overrides.parse(words, extra=("RUN", "FORMAT"))
    return print_profile(_outdir(settings), RECORDS, settings)


def _verify(words: list[str]) -> int:
    from harness.launching.verify import verify

    id_, settings = _asked(
        words, "verify which experiment? such as make verify-101", extra=("RUN",)
    )
    _keep_gpus_awake()
    return verify(id_, settings, _outdir(settings), RECORDS, _install_heavy)


def _memory(words: list[str]) -> int:
    from harness.evidence.memory import print_memory

    return print_memory(
        *_asked(words, "the memory of which experiment? such as make memory-101"), RECORDS
    )


def _speed(words: list[str]) -> int:
    from harness.evidence.speed import print_speed

    return print_speed(
        *_asked(words, "the speed of which experiment? such as make speed-408"), RECORDS
    )


def _faster(words: list[str]) -> int:
    from harness.evidence.speed import print_faster

    return print_faster(*_asked(words, "faster than which experiment? such as make faster-408"))


def _gpus(words: list[str]) -> int:
    from harness.evidence.scaling import print_gpus

    return print_gpus(*_asked(words, "how many GPUs for which experiment? such as make gpus-408"))


def _calibrate(words: list[str]) -> int:
    from harness.evidence.calibrate import calibrate

    overrides.parse(words)
    for name, machine in calibrate(RECORDS).items():
        print(f"{name}: {len(machine.rows)} rows; {machine.how_sure()}")
    return 0


def _claims(words: list[str]) -> int:
    from harness.evidence.verdicts import print_claims

    return print_claims(
        RECORDS, overrides.parse(words, extra=("CHAPTER", "HARDWARE", "AGAINST", "FORMAT"))
    )


def _clean(words: list[str]) -> int:
    from harness.run.cleaning import clean

    settings = overrides.parse(words, extra=("ALL", "YES"))
    return clean(
        _outdir(settings), everything=settings.get("ALL") == "1", agreed=settings.get("YES") == "1"
    )


def _plots(words: list[str]) -> int:
    from harness.pages import plots

    folder = _outdir(settings := overrides.parse(words)) / "plots"
    drawn, warnings = plots.pictures(_outdir(settings), RECORDS)
    print(*warnings, sep="\n", end="\n" * bool(warnings), file=sys.stderr)
    plots.write(folder, drawn)
    screen.say(f"{len(drawn)} pictures in {folder}: {', '.join(drawn)}")
    return 0


def _report(words: list[str]) -> int:
    from harness.pages.report import page

    settings = overrides.parse(words, extra=("REPORT",))
    outdir = _outdir(settings)
    path = Path(settings.get("REPORT") or outdir / "report.html").absolute()
    if path.is_dir():
        raise UserError(
            f"REPORT={settings['REPORT']} is a folder; name a file in it, such as report.html"
        )
    if settings.get("FORCE") != "1" and path.exists() and not page.is_report(path):
        raise UserError(
            f"REPORT={path} is there already and no report\nFORCE=1 replaces it, REPORT=… writes"
            " another file"
        )
    warnings = page.write(outdir, RECORDS, path)
    print(*warnings, sep="\n", end="\n" * bool(warnings), file=sys.stderr)
    print(
        f"{path} ({path.stat().st_size / 1024:.0f} KiB): open it in a browser; it needs no network"
    )
    return 0


def _tensorboard(words: list[str]) -> int:
    from harness.run import tensorboard

    settings = overrides.parse(words, extra=("RUN", "PORT"))
    _install_heavy()
    return tensorboard.show(settings, _outdir(settings))


def _docs(words: list[str]) -> int:
    from harness.pages import documents

    check = overrides.parse(words, extra=("CHECK",)).get("CHECK") == "1"
    return documents.write(RECORDS, check=check)


def _target(words: list[str]) -> int:
    """What make has no rule for: an id, a row newer than targets.mk, a target of the tutorials, or
    no target at all."""
    from harness import targets

    wanted, *rest = words or [""]
    if replaced := tutorial.replacement(wanted, rest):
        tutorial.become(replaced)
    command, *about = targets.command_of(wanted, load_catalog())
    return COMMANDS[command]([*about, *rest])


def _targets(words: list[str]) -> int:
    from harness import targets

    changed = targets.write(load_catalog())
    print(f"{targets.FILE.relative_to(ROOT)} {'written' if changed else 'is up to date'}")
    return 0


def _data(words: list[str]) -> int:
    """``data list``, ``data inspect NAME=…`` and so on; any other word names a data set to
    prepare."""
    from harness.data import commands

    name, *rest = words or ["list"]
    command = commands.COMMANDS.get(f"data-{name}")
    return command(rest) if command else commands.prepare_known(name, rest)


def _import_hf(words: list[str]) -> int:
    from harness.convert.commands import import_hf

    settings = overrides.parse(words, extra=("HF", "NAME"))
    _install_heavy()
    return import_hf(settings)


def _export_hf(words: list[str]) -> int:
    from harness.convert.commands import export_hf

    settings = overrides.parse(words, extra=("HF", "RUN", "OUT", "ADAPTERS"))
    _install_heavy()
    return export_hf(settings, _outdir(settings))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": _run,
    "train": _train,
    "checkpoints": _checkpoints,
    "generate": _generate,
    "show": _show,
    "chapter": _chapter,
    "list": _list,
    "table": _table,
    "compare": _compare,
    "doctor": _doctor,
    "arguments": _arguments,
    "parity": _parity,
    "monitor-gpu": _monitor_gpu,
    "stop": _stop,
    "record": _record,
    "verify": _verify,
    "memory": _memory,
    "speed": _speed,
    "faster": _faster,
    "gpus": _gpus,
    "calibrate": _calibrate,
    "claims": _claims,
    "profile": _profile,
    "plots": _plots,
    "report": _report,
    "tensorboard": _tensorboard,
    "data": _data,
    "clean": _clean,
    "docs": _docs,
    "import-hf": _import_hf,
    "export-hf": _export_hf,
    "target": _target,
    "targets": _targets,
}


def _id(words: list[str], question: str) -> str:
    """The id that a command is about. Raises UserError with ``question`` where there is none."""
    if not words or "=" in words[0]:
        raise UserError(question)
    return words[0]


def _asked(
    words: list[str], question: str, extra: Iterable[str] = ()
) -> tuple[str, dict[str, str]]:
    """The id that a command is about, and its settings."""
    return _id(words, question), _settings(words[1:], extra)


def _settings(words: Iterable[str], extra: Iterable[str] = ()) -> dict[str, str]:
    """The settings in ``words``, upstream's own arguments among them checked by name and value."""
    settings = overrides.parse(words, extra)
    if "ARGS" in settings:
        from harness.upstreams.megatron_lm import known_arguments

        known_arguments.check(settings["ARGS"])
    return settings


def _experiment(words: list[str]) -> tuple[Experiment, dict[str, str]]:
    """The experiment that a command is about, and its settings; where it is unknown, that is said
    first."""
    wanted = _id(words, "which experiment? such as 101 (make list shows all)")
    if not wanted[:1].isdigit():
        from harness import targets

        raise UserError(targets.unknown(wanted))
    return load_catalog().find(wanted), _settings(words[1:])


def _outdir(settings: Mapping[str, str]) -> Path:
    return Path(settings.get("OUTDIR") or OUTDIR).resolve()


def _keep_gpus_awake() -> None:
    from harness.machine.gpus import keep_awake

    keep_awake()


def _install_heavy(*stages: str) -> None:
    """Bring the packages that a run needs; the first run spends minutes here, later ones nothing.

    Raises UserError where they cannot be had, or upstream is half checked out.
    """
    from harness.machine.upstream import locate

    locate()
    if subprocess.run([ROOT / "scripts" / "setup.sh", "heavy", *stages]).returncode:
        raise UserError("the set-up did not finish; the lines above say why, make doctor says more")
