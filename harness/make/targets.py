"""Generates experiments/targets.mk: one Make target an experiment, so that ``make 101<tab>``
completes its name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import ROOT
from harness.data.sources import definitions
from harness.errors import UserError, similar
from harness.experiment.catalog import EXPERIMENTS, Catalog, load_catalog
from harness.experiment.command_line import EXPERIMENT_SETTINGS, LAUNCH_SETTINGS, Setting
from harness.experiment.experiment import Experiment
from harness.make import tutorial
from harness.system.files import write_text

FILE = EXPERIMENTS / "targets.mk"
OF_EXPERIMENTS = ("show", "memory", "speed", "faster", "gpus", "verify")
"""Commands that are about one experiment: ``make show-101``."""

HEADER = """\
# Generated from experiments/*.yaml and harness/experiment/overrides.py by `make targets`; a test keeps it fresh.
# Every target is spelled out, one a line, because zsh completes from this text and bash from make's database.
"""  # noqa: E501


def render(catalog: Catalog) -> str:
    """The text of targets.mk: the settings a command line may carry, then four kinds of target."""
    return HEADER + "\n".join(_lines(catalog)) + "\n"


def write(catalog: Catalog, file: Path = FILE) -> bool:
    """Bring ``file`` up to date; True where it changed."""
    text = render(catalog)
    if file.exists() and file.read_text(encoding="utf-8") == text:
        return False
    write_text(file, text)
    return True


def target(e: Experiment) -> str:
    """The target that completion finds: ``half-408h-…`` begins otherwise than ``408-…``, whose
    number one tab completes."""
    return f"half-{e.name}" if e.half_of else e.name


def _lines(catalog: Catalog) -> Iterator[str]:
    yield "override SETTINGS := " + " ".join(
        setting.key for setting in EXPERIMENT_SETTINGS + LAUNCH_SETTINGS
    )
    yield from _help("What is run:  make 101 KEY=VALUE …", EXPERIMENT_SETTINGS)
    yield from _help("How and where it is launched", LAUNCH_SETTINGS)
    for number in catalog.chapters:
        yield f"chapter-{number}: ; @$(HARNESS) chapter {number} $(WORDS)"
    for e in catalog.experiments:
        yield f"{target(e)}: ; @$(HARNESS) run {e.id} $(WORDS)"
    for e in catalog.experiments:
        if e.until:
            yield f"train-{e.model.name}: ; @$(HARNESS) train {e.id} $(WORDS)"
    for name, known in definitions().items():
        yield f"data-{name}: ; @$({'CHAT' if known.chat else 'DATA'}_HARNESS) data {name} $(WORDS)"
    for command in OF_EXPERIMENTS:
        for e in catalog.experiments:
            yield f"{command}-{e.id}: ; @$(HARNESS) {command} {e.id} $(WORDS)"


def meant(words: Sequence[str]) -> list[str]:
    """The harness's command line for a target without a rule and its settings.

    A target of the tutorials replaces this process.

    Raises:
        UserError: there is no such target.
    """
    wanted, *settings = words or [""]
    if replacement := tutorial.replacement(wanted, settings):
        tutorial.become(replacement)
    return [*command_of(wanted, load_catalog()), *settings]


def command_of(wanted: str, catalog: Catalog) -> tuple[str, ...]:
    """The harness's command and what it is about for a target without a rule: ``101``, or one newer
    than targets.mk.

    Raises:
        UserError: it is no target; nothing runs, and the nearest ones are named.
    """
    wanted = re.sub(r"^half-(\d{3})h?(?=-|$)", r"\1h", wanted)
    command, _, about = wanted.partition("-")
    if wanted[:1].isdigit():
        return "run", catalog.find(wanted).id
    if command in OF_EXPERIMENTS and about[:1].isdigit():
        return command, catalog.find(about).id
    if command == "chapter" and about.isdecimal() and int(about) in catalog.chapters:
        return "chapter", about
    long_runs = [
        e.id
        for e in catalog.experiments
        if e.until and command == "train" and e.model.name == about
    ]
    if long_runs:
        return "train", long_runs[-1]
    raise UserError(unknown(wanted))


def unknown(wanted: str) -> str:
    """What to say of a word that is no target, ``tabel`` or ``show-999``: the nearest ones."""
    rules = (ROOT / "Makefile").read_text(encoding="utf-8") + FILE.read_text(encoding="utf-8")
    meant = similar(wanted, dict.fromkeys(re.findall(r"^([a-z0-9][\w.-]*):", rules, re.MULTILINE)))
    return (
        f"no target {wanted}{f'; {meant}' if meant else ''}\nmake list shows all experiments, make"
        " help all targets"
    )


def _help(title: str, settings: tuple[Setting, ...]) -> Iterator[str]:
    yield f"##@ {title}"
    for setting in settings:
        yield f"#{f'{setting.key}={setting.example}'} ## {setting.does}"
