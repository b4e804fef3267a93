"""All commands, by section of ``make help``: what they do, their settings, where their code is."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from harness.errors import UserError, nearest
from harness.experiment import command_line

EVERY = " ".join(setting.key for setting in command_line.SETTINGS)


@dataclass(frozen=True)
class Command:
    """A target of make, which is also ``python -m harness NAME``.

    Its function, ``where`` in harness/, is called with what the command is about, if it is about
    something, then with the settings, if it takes any. It returns the exit status.

    Attributes:
        where: ``module:function``; empty where the Makefile has the recipe.
        does: its line in ``make help``.
        usage: its own settings, as help and errors show them; those in brackets are optional.
        general: settings that ``make help`` explains once for all commands and that it takes too.
        about: what the word after its name is, such as an experiment.
        example: such a word, which makes a target: ``show-101``.
        installs: stages of the set-up that it needs.
    """

    name: str
    where: str = ""
    does: str = ""
    usage: str = ""
    general: str = ""
    about: str = ""
    example: str = ""
    installs: str = ""

    @property
    def target(self) -> str:
        """A target of make that calls it."""
        return f"{self.name}-{self.example}" if self.example else self.name

    @property
    def keys(self) -> tuple[str, ...]:
        """Every setting that it takes."""
        own = [key for word in _words(self.usage) for key in _KEY.findall(word)]
        return tuple(dict.fromkeys([*own, *self.general.split()]))

    @property
    def required(self) -> tuple[str, ...]:
        """The settings that must be given.

        Of alternatives, ``RUN=…|WEIGHTS=…``, and of ``NAME=<name>``, the command itself says what
        is missing.
        """
        words = [
            word for word in _words(self.usage) if not word.startswith("[") and "<" not in word
        ]
        return tuple(keys[0] for keys in map(_KEY.findall, words) if len(keys) == 1)

    def parse(self, words: Sequence[str]) -> dict[str, str]:
        """The settings in ``words``, ``KEY=VALUE`` each.

        Raises:
            UserError: a setting is unknown, not for this command, missing, or no ``KEY=VALUE``.
        """
        settings = command_line.parse(words, self.keys)
        if refused := [f"{key}={settings[key]}" for key in settings if key not in self.keys]:
            takes = f"takes {', '.join(self.keys)}" if self.keys else "takes no settings"
            raise UserError(
                f"make {self.target} does not take {' '.join(refused)}\nmake {self.target} {takes}"
            )
        command_line.require(settings, self.required, f"make {self.target} {self.usage}")
        return settings

    def function(self) -> Callable[..., int]:
        """Import what does it."""
        module, _, name = self.where.partition(":")
        return getattr(import_module(f"harness.{module}"), name)


_KEY = re.compile(r"(?:^|[\[|])([A-Z][A-Z0-9_]*)=")


def _words(usage: str) -> list[str]:
    return re.findall(r"\[?[A-Z][A-Z0-9_]*=(?:\"[^\"]*\"|[^\s\]])*\]?", usage)


def _of_experiment(name: str, where: str, does: str, usage: str = "") -> Command:
    return Command(name, where, does, usage, EVERY, about="experiment", example="101")


SECTIONS: dict[str, tuple[Command, ...]] = {
    "Look": (
        Command(
            "list",
            "experiment.commands:list_experiments",
            "the catalogue",
            "[CHAPTER=400] [MODEL=gpt2-8.3b] [GPUS=4]",
        ),
        Command("doctor", "doctor:doctor", "what is installed, what is missing and how to get it"),
        Command(
            "arguments",
            "upstreams.megatron_lm.commands:arguments",
            "Megatron-LM's own arguments, with their number",
            "[MATCH=moe]",
            installs="heavy",
        ),
    ),
    "Run": (
        Command(
            "run",
            "launching.commands:run_experiment",
            "run experiment 101; without a GPU, a miniature of it on the CPU",
            general=EVERY,
            about="experiment",
        ),
        _of_experiment("show", "planning.commands:show", "the script that it would run"),
        _of_experiment(
            "memory",
            "evidence.commands:memory",
            "the memory it needs; whether it fits CARD= or the GPUs here",
        ),
        _of_experiment("speed", "evidence.commands:speed", "the step time to expect, part by part"),
        _of_experiment(
            "faster", "evidence.commands:faster", "layouts that do the same work in less time"
        ),
        _of_experiment(
            "gpus",
            "evidence.commands:gpus",
            "how many GPUs the same work needs; what more of them bring",
        ),
        _of_experiment(
            "verify",
            "launching.commands:verify_record",
            "run it again, or take a run, and compare with its record",
            "[RUN=label-or-id]",
        ),
        Command(
            "chapter",
            "launching.commands:run_chapter",
            "all experiments of a chapter, small ones side by side",
            general=EVERY,
            about="chapter",
            example="100",
        ),
        Command(
            "train",
            "launching.commands:train",
            "a long run to a validation loss; run again, it resumes",
            general=EVERY,
            about="experiment",
            example="gpt3-345m",
        ),
        Command(
            "parity",
            "parity:main",
            "is it correct? losses of every parallelism against one process",
            installs="heavy",
        ),
        Command(
            "stop",
            "launching.commands:stop_runs",
            "end the runs of this machine",
            "[RUN=label]",
            "OUTDIR",
        ),
        Command("monitor-gpu", "machine.gpus:monitor", "a live view of the GPUs"),
        Command(
            "checkpoints",
            "planning.commands:list_checkpoints",
            "checkpoints with step, size and loss; whole or damaged",
            "[RUN=label-or-id-or-folder] [VERIFY=1]",
            "OUTDIR",
        ),
        Command(
            "generate",
            "launching.commands:sample_text",
            "sample text from a checkpoint",
            'RUN=label-or-id|WEIGHTS=name PROMPT="…"|QUESTION="…"|DATA=name [TOKENS=64]'
            " [TEMPERATURE=0.8] [TOP_K=40] [TOP_P=0.9] [SEED=1]",
            "DEVICE OUTDIR",
        ),
    ),
    "Read": (
        Command(
            "table",
            "evidence.commands:table",
            "every run with its published numbers",
            "[CHAPTER=100] [ID=101] [HARDWARE=h200-141gb] [AGAINST=h200-8gpu]"
            " [FORMAT=terminal|markdown|csv|json]",
            "OUTDIR",
        ),
        Command(
            "claims",
            "evidence.commands:claims",
            "do the numbers show what the tutorials claim?",
            "[CHAPTER=400] [HARDWARE=h200-141gb] [AGAINST=h200-8gpu]"
            " [FORMAT=terminal|markdown|json]",
        ),
        Command(
            "compare",
            "evidence.commands:compare",
            "two runs side by side, by id, name or label",
            "A=101 B=111 [FORMAT=terminal|markdown|csv|json]",
            "OUTDIR",
        ),
        Command(
            "report",
            "pages.commands:report",
            "one page: tables, plots, comparisons",
            "[REPORT=outdir/report.html]",
            "OUTDIR FORCE",
        ),
        Command(
            "tensorboard",
            "run.commands:tensorboard",
            "curves of losses, speed and memory, in a browser",
            "[RUN=label-or-id] [PORT=6006]",
            "OUTDIR",
            installs="heavy",
        ),
        Command(
            "plots",
            "pages.commands:plots",
            "memory, step time, scaling, timelines and losses as SVG in outdir/plots",
            general="OUTDIR",
        ),
        Command(
            "profile",
            "profiling.commands:profile",
            "where the time of a step goes, of a run with PROFILE=1",
            "RUN=label-or-id [FORMAT=terminal|csv|json]",
            "OUTDIR",
        ),
    ),
    "Data:  make data-<tab>, then make 101 DATA=<name>": (
        Command(
            "data",
            "data.commands:prepare_listed",
            "",
            "[TOKENIZER=gpt2] [WORKERS=4] [HUB=folder] [SIZE_MB=100] [NAME=…] [LIMIT=1000]",
            "FORCE",
            about="data set",
            example="openwebtext-10k",
        ),
        Command(
            "data-mappings",
            "data.commands:build_mappings",
            "",
            "DATA=… SEQ=1024 SAMPLES=800,240,80 SPLIT=949,50,1 [SEED=1234]",
        ),
        Command("data-list", "data.commands:list_sets", "data sets that are, or can be, prepared"),
        Command(
            "data-prepare",
            "data.commands:prepare_input",
            "a data set of your own text",
            "NAME=… INPUT=file-or-folder [RULES=sv] [TOKENIZER=gpt2] [KEY=text]"
            " [DOCUMENTS=line|file] [LIMIT=1000] [LONGEST=16] [APPEND_EOD=1] [WORKERS=4]",
            "FORCE",
            installs="data",
        ),
        Command(
            "data-chat",
            "data.commands:prepare_conversations",
            "a data set of conversations, to fine-tune on",
            "NAME=… INPUT=chat.jsonl [TOKENIZER=folder|gpt2|bytes]",
            "FORCE",
            installs="heavy",
        ),
        Command(
            "data-clean",
            "data.commands:clean_files",
            "text without what its rules drop",
            "INPUT=… OUT=folder [RULES=sv] [WORKERS=4]",
            "FORCE",
            installs="data",
        ),
        Command(
            "data-merge",
            "data.commands:merge_sets",
            "prepared data sets of one tokenizer joined into one",
            'NAME=… FROM="a b"',
            installs="data",
        ),
        Command(
            "data-inspect",
            "data.commands:inspect_set",
            "documents, tokens, lengths, samples",
            "NAME=<name> [SAMPLES=3]",
            installs="data",
        ),
        Command(
            "data-check",
            "data.commands:check_set",
            "is every byte of it in order?",
            "NAME=<name>",
            installs="data",
        ),
    ),
    "Weights:  make import-hf, then make 101 WEIGHTS=<name>": (
        Command(
            "import-hf",
            "convert.commands:import_hf",
            "convert a Hugging Face model to Megatron-LM's format",
            "HF=folder-or-repository [NAME=…] [DATA=…] [TP=…] [PP=…] [EP=…]",
            "FORCE",
            installs="heavy",
        ),
        Command(
            "export-hf",
            "convert.commands:export_hf",
            "convert a run's checkpoint to Hugging Face's format",
            "RUN=label-or-folder OUT=folder [HF=like-this-one] [ADAPTERS=1]",
            "OUTDIR",
            installs="heavy",
        ),
    ),
    "Set up": (
        Command(
            "setup",
            does="everything a run needs, into .venv (the first run does this by itself)",
            general="DEVICE",
        ),
        Command(
            "setup-gpu",
            does="CUDA and Transformer Engine, without a container",
            usage="[WHEELS=folder] [MAX_JOBS=8]",
            general="DEVICE DRY_RUN",
        ),
        Command("docker-build", does="the GPU image", usage="[BASE=image] [DOCKER=podman]"),
        Command(
            "docker-run",
            does="a shell in it, where make 101<tab> works",
            usage="[DOCKER=podman]",
            general="OUTDIR",
        ),
    ),
    "Develop": (
        Command("help", does="everything, with every setting"),
        Command("test", does="quick tests, real gloo training, parity: a quarter of an hour"),
        Command("test-quick", does="without torch and without data sets: two minutes"),
        Command("test-full", does="everything, long ones too"),
        Command("lint", does="ruff and shellcheck"),
        Command(
            "record",
            "evidence.commands:record",
            "keep a run in experiments/records",
            "RUN=label-or-id",
            "OUTDIR FORCE",
        ),
        Command(
            "calibrate",
            "evidence.commands:calibrate",
            "fit the formula of make speed-101 to the records; takes minutes",
            installs="calibrate",
        ),
        Command(
            "targets",
            "make.commands:write_targets",
            "write experiments/targets.mk anew from commands and catalogue",
        ),
        Command(
            "docs",
            "pages.commands:docs",
            "write README.md and docs/ anew from the records",
            "[CHECK=1]",
        ),
        Command(
            "clean",
            "run.commands:clean",
            "remove runs that failed and cannot be resumed; asks first",
            "[YES=1] [ALL=1]",
            "OUTDIR",
        ),
        Command(
            "clean-all",
            does="remove every run and .venv; asks first",
            usage="[YES=1]",
            general="OUTDIR",
        ),
    ),
}
COMMANDS = {command.name: command for section in SECTIONS.values() for command in section}


def find(name: str) -> Command:
    """The command called ``name``. Raises UserError where there is none."""
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}; {nearest(name, COMMANDS)}")
    return COMMANDS[name]
