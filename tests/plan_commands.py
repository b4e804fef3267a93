"""Plans commands of make without running them: ``python tests/plan_commands.py COMMANDS.json`` in a copy of the repository.

What a command would do is replaced where it would begin to train, write or wait; all that reads, parses, checks and plans before that
is the harness's own. One JSON line on stdout for each command and device: what was refused, and what was printed.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shutil
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import ROOT, cli
from harness.commands import COMMANDS
from harness.data import data_sets
from harness.data.manifest import Chat, Counted, Manifest, TextSource, TokenizerUsed, Written
from harness.errors import UserError
from harness.evidence import scaling
from harness.experiment.catalog import load_catalog
from harness.machine.gpus import LocalGpu
from harness.make import targets
from harness.planning import checked, starting_weights
from harness.planning.request import RunRequest
from harness.planning.starting_weights import StartingWeights
from harness.search.layouts import by_gpus

SETS = {
    "mine": False,
    "synthetic": False,
    "synthetic-sv": False,
    "openwebtext-10k": False,
    "tinystories-10k": False,
    "a": False,
    "b": False,
    "toy-chat": True,
    "toy-chat-2": True,
}
"""Prepared data sets -> whether they are conversations."""
GPUS = tuple(LocalGpu(index, "NVIDIA H200", f"GPU-{index}", 143771.0) for index in range(8))
ENDS = {
    "harness.launching.stop": ("stop",),
    "harness.launching.verify": ("verify",),
    "harness.evidence.records": ("record",),
    "harness.evidence.calibrate": ("calibrate",),
    "harness.pages.documents": ("write",),
    "harness.make.targets": ("write",),
    "harness.evidence.compare": ("print_compare",),
    "harness.pages.report.page": ("write",),
    "harness.pages.plots": ("pictures", "write"),
    "harness.profiling.profile": ("print_profile",),
    "harness.run.cleaning": ("clean",),
    "harness.parity": ("main",),
    "harness.doctor": ("doctor",),
    "harness.run.tensorboard": ("show",),
    "harness.machine.gpus": ("monitor", "keep_awake"),
    "harness.upstreams.megatron_lm.arguments": ("print_arguments",),
    "harness.run.checkpoint_list": ("print_list",),
    "harness.generate": ("parse", "generate"),
    "harness.convert.commands": ("import_hf", "export_hf"),
    "harness.launching.chapter": ("run_chapter",),
    "harness.data.prepare": ("prepare",),
    "harness.data.merge": ("merge",),
    "harness.data.check": ("check",),
    "harness.data.look": ("inspect",),
    "harness.data.clean": ("clean",),
    "harness.data.chat.prepare": ("prepare_chat", "prepare_known"),
    "harness.machine.packages": ("install",),
    "harness.launching.commands": ("prepare_conversations",),
    "harness.sweep.commands": ("_run", "prepare_conversations"),
}
"""What would train, write, or need more than this test has: replaced, so that nothing happens."""
MOST_GPUS = 8
"""That searches are asked about here: layouts over several nodes run where each is started."""
NEEDED = {
    "import-hf": ("HF",),
    "export-hf": ("RUN", "OUT"),
    "record": ("RUN",),
    "profile": ("RUN",),
    "compare": ("A", "B"),
    "generate": ("PROMPT|QUESTION|DATA", "RUN|WEIGHTS"),
}
IDS = ("RUN", "A", "B")


class Reached(Exception):
    """A command came to what is replaced here."""


def main() -> None:
    commands = [tuple(words) for words in json.loads(Path(sys.argv[1]).read_text())]
    for name, chat in SETS.items():
        _prepared(name, chat)
    (ROOT / "texts").mkdir(exist_ok=True)
    for name in ("texts/one.jsonl", "crawl.jsonl", "chat.jsonl"):
        (ROOT / name).write_text('{"text": "a document"}\n')
    _stand_in()
    for words in commands:
        for device in (
            ("cpu", "cuda") if re.match(r"(show-|chapter-|train-|half-)?\d", words[0]) else ("cpu",)
        ):
            refused, said = _plan(words, device)
            print(
                json.dumps({"words": words, "device": device, "refused": refused, "said": said}),
                flush=True,
            )


def _plan(words: tuple[str, ...], device: str) -> tuple[str | None, str]:
    """Why the command is refused, if it is; and what it printed."""
    target, *settings = words
    if target.endswith("*"):
        typed = re.sub(r"^(\d{3}h.*)", r"half-\1", target[:-1])  # scripts/completion.bash
        return (
            None
            if any(name.startswith(typed) for name in targets.names(load_catalog()))
            else f"no target begins with {target[:-1]}"
        ), ""
    try:
        argv = [*_argv(target), *settings]
    except UserError as error:
        return f"error: {error}", ""
    keys = {word.partition("=")[0] for word in settings}
    if "DEVICE" not in keys and argv[0] in ("run", "train", "show", "chapter"):
        argv.append(f"DEVICE={device}")
    if argv[0] in ("run", "train") and "DRY_RUN" not in keys:
        argv.append("DRY_RUN=1")
    out = io.StringIO()
    given = dict(word.split("=", 1) for word in settings)
    STATE.update(device=given.get("DEVICE", device), experiment=None)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            _known(argv[0], given)
            status = cli.main(argv)
        except Reached:
            return None, out.getvalue()
        except UserError as error:
            return f"error: {error}", ""
        except ImportError as error:
            return f"not installed: {error.name}", ""
    said = out.getvalue()
    if not settings and " missing: " in said:
        return None, ""  # a command's name alone, in a sentence
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    return (
        errors[0] if errors else f"exit status {status}" if status and not _verdict(argv) else None
    ), said


def _argv(target: str) -> Sequence[str]:
    """The words that make calls the harness with."""
    catalog = load_catalog()
    if target in COMMANDS:
        return (target,)
    about = dict(targets.about(catalog))
    return about[target].split() if target in about else targets.command_of(target, catalog)


def _verdict(argv: list[str]) -> bool:
    """Whether exit status 1 of this command is an answer, not a failure."""
    return argv[0] in ("memory", "claims", "gpus", "faster")


def _known(command: str, given: dict[str, str]) -> None:
    """What a replaced function would have refused: ids that are none, settings that are missing."""
    for group in NEEDED.get(command, ()):
        if given and not any(key in given for key in group.split("|")):
            raise UserError(f"{group} missing")
    for key in IDS:
        if re.match(r"\d{3}h?(-|$)", given.get(key, "")):
            load_catalog().find(given[key].split("-")[0])


STATE: dict[str, object] = {"device": "cpu"}


def _stand_in() -> None:
    scaling.by_gpus = lambda experiment, card, machine, most=MOST_GPUS: by_gpus(
        experiment, card, machine, min(most, MOST_GPUS)
    )
    for module, names in ENDS.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue  # of a set-up stage that is not here
        for name in names:
            getattr(found, name)  # renamed? then rename it here
            setattr(
                found, name, (lambda *a, **k: None) if name.startswith(("_", "keep")) else _reached
            )
    importlib.import_module("harness.launching.chapter").run_chapter = _plan_each
    shutil.which = lambda *a, **k: None  # no sbatch: the script is printed
    importlib.import_module("harness.machine.gpus").list_gpus = lambda: (
        GPUS if STATE["device"] == "cuda" else ()
    )
    RunRequest.resume = None
    checked._loaded_checkpoint = lambda *a, **k: None
    starting_weights.find = _weights


def _reached(*args: object, **kwargs: object) -> None:
    raise Reached


def _plan_each(experiments, plan_of, **kwargs: object) -> int:
    refused = []
    for e in experiments:
        try:
            plan_of(e)
        except UserError as error:
            refused.append(f"{e.id}: {error}")
    if len(refused) == len(experiments):
        raise UserError(refused[0])
    return 0


def _weights(named: str, outdir: Path) -> StartingWeights:
    """Weights as ``named``: of an experiment, of a model of the catalogue, else GPT-2's of 124 million parameters."""
    catalog = load_catalog()
    models = {e.model.name: e.model for e in catalog.experiments}
    small = models["gpt2-xl"].model_copy(
        update={"name": "gpt2", "num_layers": 12, "hidden_size": 768, "num_attention_heads": 12}
    )
    by_id = {e.id: e.model for e in catalog.experiments}
    model = by_id.get(named) or models.get(named) or small
    positions = 131072 if model is not small else 1024
    return StartingWeights(named, f"weights/{named}", model, positions, None)


def _prepared(name: str, chat: bool, documents: int = 2000, tokens_each: int = 4) -> None:
    """A data set in data/<name>, made without numpy: headers, sizes and manifest are right, tokens are 0."""
    prefix = data_sets.prefix_of(name, ROOT / "data")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    lengths = struct.pack(f"<{documents}i", *[tokens_each] * documents)
    pointers = struct.pack(
        f"<{documents}q", *range(0, 2 * tokens_each * documents, 2 * tokens_each)
    )
    ends = struct.pack(f"<{documents + 1}q", *range(documents + 1))
    idx = (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 8, documents, documents + 1)
        + lengths
        + pointers
        + ends
    )
    prefix.with_name(prefix.name + ".idx").write_bytes(idx)
    prefix.with_name(prefix.name + ".bin").write_bytes(bytes(2 * tokens_each * documents))
    tokens = documents * tokens_each
    Manifest(
        name=name,
        recipe="",
        created=0.0,
        source=TextSource(kind="files", asked={"input": name}),
        cleaned=None,
        counted=Counted(
            records=documents,
            documents=documents,
            empty=0,
            sequences=documents,
            tokens=tokens,
            skipped={},
        ),
        tokenizer=TokenizerUsed(
            type="NullTokenizer", name="null", sha256="0", vocab_size=1000, eod=None, by="test"
        ),
        append_eod=False,
        chat=Chat(template="simple", template_sha256="0", answer_tokens=1) if chat else None,
        written=Written(
            dtype="uint16",
            bin_bytes=2 * tokens,
            bin_sha256=name,
            idx_bytes=len(idx),
            idx_sha256=name,
        ),
        seconds={},
        versions={},
    ).write(prefix.parent)


if __name__ == "__main__":
    main()
