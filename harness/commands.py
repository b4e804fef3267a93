"""All commands, by section of ``make help``: their settings, and where the function is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from harness.errors import UserError, nearest

EVERY = "every setting of an experiment and of its launch"


@dataclass(frozen=True)
class Command:
    """A target of make, which is also ``python -m harness NAME``.

    Its function, ``where`` in harness/, is called with what the command is about, if
    ``about`` is set, then with the settings, if the command takes any, and returns the exit status.

    Attributes:
        does: its line in ``make help``.
        usage: its own settings, as help and errors show them; those in brackets are optional.
        general: settings that ``make help`` explains once for all commands and that it takes too.
        about: what it is about, where the word after its name says so, such as an experiment.
        installs: the set-up stage that it needs before anything else.
    """

    name: str
    where: str
    does: str = ""
    usage: str = ""
    general: str = ""
    about: str = ""
    installs: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """Its own settings."""
        return tuple(key for word in _words(self.usage) for key in _KEY.findall(word))

    @property
    def required(self) -> tuple[str, ...]:
        """The settings that must be given. Of ``RUN=…|WEIGHTS=…``, neither one must be."""
        words = [_KEY.findall(word) for word in _words(self.usage) if not word.startswith("[")]
        return tuple(keys[0] for keys in words if len(keys) == 1)

    def function(self) -> Callable[..., int]:
        """Import what does it."""
        module, _, name = self.where.partition(":")
        return getattr(import_module(f"harness.{module}"), name)


_KEY = re.compile(r"(?:^|[\[|])([A-Z][A-Z0-9_]*)=")


def _words(usage: str) -> list[str]:
    return re.findall(r"\[?[A-Z][A-Z0-9_]*=(?:\"[^\"]*\"|[^\s\]])*\]?", usage)


SECTIONS: dict[str, tuple[Command, ...]] = {
    "": (
        Command("run", "launching.commands:run_experiment", general=EVERY, about="experiment"),
        Command("train", "launching.commands:train", general=EVERY, about="experiment"),
        Command("chapter", "launching.commands:run_chapter", general=EVERY, about="chapter"),
        Command("show", "planning.commands:show", general=EVERY, about="experiment"),
        Command("memory", "evidence.commands:memory", general=EVERY, about="experiment"),
        Command("speed", "evidence.commands:speed", general=EVERY, about="experiment"),
        Command("faster", "evidence.commands:faster", general=EVERY, about="experiment"),
        Command("gpus", "evidence.commands:gpus", general=EVERY, about="experiment"),
        Command(
            "verify", "launching.commands:verify_record", "", "[RUN=label]", EVERY, "experiment"
        ),
        Command(
            "data",
            "data.commands:prepare_known",
            "",
            "[TOKENIZER=gpt2] [WORKERS=4] [HUB=folder] [SIZE_MB=100] [NAME=…] [LIMIT=1000]",
            "FORCE",
            "data set",
        ),
        Command(
            "data-mappings",
            "data.commands:build_mappings",
            "",
            "DATA=… SEQ=1024 SAMPLES=800,240,80 SPLIT=949,50,1 [SEED=1234]",
        ),
    ),
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
            "where the time of a traced step goes",
            "RUN=label-or-id [FORMAT=terminal|csv|json]",
            "OUTDIR",
        ),
        Command(
            "calibrate",
            "evidence.commands:calibrate",
            "fit the formula of make speed-101 to the records; takes minutes",
        ),
        Command(
            "record",
            "evidence.commands:record",
            "keep a run in experiments/records",
            "RUN=label-or-id",
            "OUTDIR FORCE",
        ),
    ),
    "Data": (
        Command("data-list", "data.commands:list_sets", "data sets that are, or can be, prepared"),
        Command(
            "data-prepare",
            "data.commands:prepare_input",
            "a data set of your own text",
            "NAME=… INPUT=file-or-folder [RULES=sv] [TOKENIZER=gpt2] [KEY=text]"
            " [DOCUMENTS=line|file] [LIMIT=1000] [LONGEST=16] [APPEND_EOD=1] [WORKERS=4]",
            "FORCE",
        ),
        Command(
            "data-chat",
            "data.commands:prepare_conversations",
            "a data set of conversations, to fine-tune on",
            "NAME=… INPUT=chat.jsonl [TOKENIZER=folder|gpt2|bytes]",
            "FORCE",
        ),
        Command(
            "data-clean",
            "data.commands:clean_files",
            "text without what its rules drop",
            "INPUT=… OUT=folder [RULES=sv] [WORKERS=4]",
            "FORCE",
        ),
        Command(
            "data-merge",
            "data.commands:merge_sets",
            "prepared data sets of one tokenizer joined into one",
            'NAME=… FROM="a b"',
        ),
        Command(
            "data-inspect",
            "data.commands:inspect_set",
            "documents, tokens, lengths, samples",
            "NAME=… [SAMPLES=3]",
        ),
        Command("data-check", "data.commands:check_set", "is every byte of it in order?", "NAME=…"),
    ),
    "Weights": (
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
    "Develop": (
        Command("targets", "make.commands:write_targets", "write experiments/targets.mk anew"),
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
    ),
}
COMMANDS = {command.name: command for section in SECTIONS.values() for command in section}


def find(name: str) -> Command:
    """The command called ``name``. Raises UserError where there is none."""
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}; {nearest(name, COMMANDS)}")
    return COMMANDS[name]
