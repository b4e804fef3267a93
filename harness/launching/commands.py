"""``make 101``, ``make train-…``, ``make chapter-100``, verify, stop and generate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from textwrap import indent

from harness import RECORDS, generate
from harness.data import data_sets
from harness.errors import UserError, first_line
from harness.experiment import command_line
from harness.experiment.catalog import load_catalog
from harness.experiment.experiment import Experiment
from harness.launching import (
    chapter,
    clusters,
    jobs,
    kubernetes,
    launch,
    stop,
    submission,
    terminal,
    verify,
)
from harness.launching.active_run import Finished
from harness.machine import gpus, packages
from harness.planning import plan, run_to_resume
from harness.planning.commands import made_here, print_script
from harness.planning.plan import Plan
from harness.planning.request import batch_of
from harness.run import checkpoint_list, directory, finding
from harness.upstreams.megatron_lm import tracking
from harness.upstreams.megatron_lm.flags import Device


def run_experiment(id_: str, settings: Mapping[str, str]) -> int:
    """Run an experiment here, submit it to Slurm, or print its script (DRY_RUN=1)."""
    experiment = load_catalog().find(id_)
    if batch := batch_of(settings):
        return _submit(experiment, settings, batch)
    gpus.keep_awake()
    dry_run = settings.get("DRY_RUN") == "1"
    if not dry_run:
        prepare_conversations([experiment], settings)
    device = plan.choose_device(settings, only_show=dry_run)
    planned = plan.plan(experiment, settings, device)
    if dry_run:
        return print_script(planned, settings)
    if (status := _finished_before(planned)) is not None:
        return status
    packages.install("heavy", *(["tracking"] if planned.extras.tracking else []))
    if planned.extras.tracking:
        tracking.check(planned.extras.tracking)
    finished = launch.run_plan(planned, hang_seconds=command_line.count_in(settings, "HANG"))
    if planned.experiment.profile and finished.result.status == "ok":
        from harness.profiling import profile

        profile.tell(finished.dir)
    if finished.result.status == "oom" and chapter.as_published(finished):
        print(
            f"  reproduced: the published {planned.experiment.half_of or 'run'} ran out of"
            " memory too"
        )
        return 0
    return finished.exit_status


def train(id_: str, settings: Mapping[str, str]) -> int:
    """Begin a long run, resume it after an interruption, or show its result at its end."""
    experiment = load_catalog().find(id_)
    if experiment.until is None:
        raise UserError(
            f"{experiment.id} has no validation loss at which it ends\n"
            f"set one, UNTIL=3.2; make {experiment.id} STEPS=100 trains for a number of steps"
        )
    return run_experiment(id_, {"SAVE": "1", "RESUME": "auto", **settings})


def run_chapter(number: str, settings: Mapping[str, str]) -> int:
    """Run the experiments of a chapter, small ones side by side (PACK=0: one after another)."""
    experiments = load_catalog().in_chapter(command_line.count("chapter", number))
    if settings.get("SLURM") == "1":
        return _submit_chapter(number, experiments, settings)
    if whole := [key for key in ("DRY_RUN", "K8S", "RESUME") if settings.get(key, "0") != "0"]:
        raise UserError(
            f"{whole[0]}=1 is for one experiment: make {experiments[0].id} {whole[0]}=1\n"
            f"make list CHAPTER={number} lists the experiments of this chapter"
        )
    gpus.keep_awake()
    device = plan.choose_device(settings)
    prepare_conversations(experiments, settings)
    packages.install("heavy")
    return chapter.run_chapter(
        experiments,
        lambda experiment: plan.plan(experiment, settings, device),
        pack=settings.get("PACK") != "0",
        force=settings.get("FORCE") == "1",
        hang_seconds=command_line.count_in(settings, "HANG"),
    )


def verify_record(id_: str, settings: Mapping[str, str]) -> int:
    """Run an experiment again, or take RUN=, and compare it with its record."""
    gpus.keep_awake()
    return verify.verify(
        id_, settings, finding.outdir(settings), RECORDS, lambda: packages.install("heavy")
    )


def stop_runs(settings: Mapping[str, str]) -> int:
    """End the runs of this machine, or RUN=."""
    return stop.stop(finding.outdir(settings), settings.get("RUN"))


def show_jobs(settings: Mapping[str, str]) -> int:
    """List the jobs that were submitted here; with JOB= follow one to its end."""
    outdir = finding.outdir(settings)
    if number := settings.get("JOB"):
        return jobs.follow(outdir, number)
    return jobs.show(outdir)


def cancel_job(settings: Mapping[str, str]) -> int:
    """Cancel a job and those of its chain that wait for it."""
    return jobs.cancel(finding.outdir(settings), settings["JOB"], settings.get("FORCE") == "1")


def sample_text(settings: Mapping[str, str]) -> int:
    """Sample text from a checkpoint."""
    request = generate.parse(settings, finding.outdir(settings))
    packages.install("heavy")
    return generate.generate(request, plan.choose_device(settings))


def _submit(experiment: Experiment, settings: Mapping[str, str], batch: str) -> int:
    if batch == "K8S":
        if settings.get("DEVICE", "cuda") != "cuda":
            raise UserError(
                f"K8S= DEVICE={settings['DEVICE']}: pods have GPUs; leave DEVICE= out, or K8S=:"
                f" make {experiment.id} DEVICE=cpu runs here"
            )
        planned = plan.plan(experiment, {**settings, "DEVICE": "cuda"}, "cuda")
        return kubernetes.create_or_print(planned, settings)
    settings, device = _for_job(settings)
    return submission.submit_or_print(plan.plan(experiment, settings, device), settings)


def _submit_chapter(
    number: str, experiments: Iterable[Experiment], settings: Mapping[str, str]
) -> int:
    """Submit the experiments of a chapter that have no result yet, as arrays."""
    settings, device = _for_job(settings)
    plans: list[Plan] = []
    for experiment in experiments:
        try:
            planned = plan.plan(experiment, settings, device)
        except UserError as error:
            print(f"{experiment.name}: skipped: {first_line(error)}")
            continue
        earlier = (
            None
            if settings.get("FORCE") == "1"
            else chapter.earlier_result(planned, directory.runs(planned.outdir)[0])
        )
        if earlier:
            print(f"{experiment.name}: {earlier.dir.label} has its result, FORCE=1 runs it again")
        else:
            plans.append(planned)
    return submission.submit_all(plans, settings, f"chapter-{number}")


def _for_job(settings: Mapping[str, str]) -> tuple[dict[str, str], Device]:
    """``settings`` as the cluster's profile completes them, and the device, cuda unless DEVICE=cpu:
    a login node has no GPU."""
    device = plan.choose_device({"DEVICE": "cuda", **settings}, only_show=True)
    return clusters.find(settings).settings({**settings, "DEVICE": device}), device


def prepare_conversations(experiments: Iterable[Experiment], settings: Mapping[str, str]) -> None:
    """Prepare the conversations that are made here in seconds: on mock data, nothing is learned."""
    known = made_here()
    wanted = dict.fromkeys(settings.get("DATA", each.published_data) for each in experiments)
    there = data_sets.prepared_names()
    if missing := [name for name in wanted if name in known and name not in there]:
        packages.install("heavy")
        from harness.data.chat import prepare

        for name in missing:
            prepare.prepare_known(known[name])


def _finished_before(planned: Plan) -> int | None:
    """Show the result of the run that RESUME=1 finds complete, and return its exit status.

    None where there is something left to train.
    """
    earlier = planned.resumes
    if earlier is None or not run_to_resume.at_its_end(earlier, planned.experiment):
        return None
    result = earlier.read_result()
    print(terminal.summary(earlier.label, earlier.path, result))
    if damaged := checkpoint_list.damaged_at_the_end(earlier):
        print(indent(damaged, "  "))
    return Finished(earlier, result).exit_status
