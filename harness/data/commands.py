"""The commands ``make data-…``; each returns the exit status."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from harness.data.data_sets import blend, find, prepared_names
from harness.data.definitions import definition, definitions
from harness.data.documents import RULES as READING
from harness.data.documents import TextFile
from harness.data.manifest import Manifest
from harness.data.names import DATA, check_name
from harness.data.progress import StageProgress, amount
from harness.data.sources import local_files
from harness.errors import UserError, nearest
from harness.experiment import command_line
from harness.machine import packages
from harness.system.files import expanded, replace_folder, told_if_unwritable
from harness.system.screen import say


def list_sets() -> int:
    """List the data sets that can be prepared or are."""
    known = definitions()
    there = prepared_names()
    states = {
        name: _state(name) if name in there else "not prepared"
        for name in dict.fromkeys((*known, *there))
    }
    width, widest = max(map(len, states)), max(map(len, states.values()))
    for name in states:
        shows = known[name].shows if name in known else "your own"
        say(f"  {name:{width}}  {states[name]:{widest}}  {shows}", hang=width + widest + 6)
    print()
    first = next(iter(known))
    say(f"make data-{first} prepares one, make 101 DATA={first} trains on it;")
    say("make data-prepare NAME=… INPUT=file-or-folder prepares your own text")
    return 0


def inspect_set(settings: Mapping[str, str]) -> int:
    """Print documents, tokens, lengths and some text of a data set."""
    from harness.data import look

    samples = command_line.count("SAMPLES", settings.get("SAMPLES", "3"), least=0)
    print(*look.inspect(_name(settings), samples), sep="\n")
    return 0


def check_set(settings: Mapping[str, str]) -> int:
    """Check everything about a data set; returns 1 if something is wrong."""
    from harness.data.check import check

    name, wrong = _name(settings), 0
    if name not in prepared_names():
        find(name)
    with StageProgress() as progress:
        for finding in check(name, watch=lambda done, total: progress.show("tokens", done, total)):
            progress.end()
            print(f"  {'ok   ' if finding.right else 'WRONG'}  {finding.what}: {finding.seen}")
            wrong += not finding.right
    if wrong:
        known = name in definitions()
        again = f"make data-{name}" if known else f"make data-prepare NAME={name} INPUT=…"
        print(f"{name} is damaged; {again} FORCE=1 replaces it")
    return 1 if wrong else 0


def prepare_listed(name: str, settings: Mapping[str, str]) -> int:
    """``make data-<name>``: install the packages that it needs, then prepare it."""
    packages.install("heavy" if definition(name).chat else "data")
    return prepare_known(name, settings)


def prepare_known(name: str, settings: Mapping[str, str]) -> int:
    """``make data-<name>``: prepare a data set of data/datasets.yaml."""
    from harness.data.prepare import prepare, recipe_of

    known = definition(name)
    if known.chat:
        from harness.data.chat.prepare import prepare_known as prepare_known_chat

        return prepare_known_chat(known, settings)
    recipe = recipe_of(known)
    if "SIZE_MB" in settings:
        if not hasattr(recipe.source, "size_mb"):
            raise UserError(
                f"SIZE_MB={settings['SIZE_MB']}: {name} is not generated, so its size is fixed"
            )
        size = command_line.count("SIZE_MB", settings["SIZE_MB"])
        recipe = replace(recipe, source=recipe.source.model_copy(update={"size_mb": size}))
    limit = command_line.count_in(settings, "LIMIT") or recipe.layout.limit
    recipe = replace(
        recipe,
        name=check_name(settings.get("NAME", recipe.name)),
        layout=replace(recipe.layout, limit=limit),
        tokenizer=settings.get("TOKENIZER", recipe.tokenizer),
    )
    return _done(prepare(recipe, _means(settings)))


def prepare_input(settings: Mapping[str, str]) -> int:
    """``make data-prepare NAME=… INPUT=…``: prepare the user's own text."""
    from harness.data.documents import LONGEST_MIB, TextLayout
    from harness.data.prepare import Recipe, prepare

    each = settings.get("DOCUMENTS", "line")
    if each not in ("line", "file"):
        raise UserError(
            f"DOCUMENTS={each}: what of a text file is a document: each line, or the whole file?"
            " Give line or file"
        )
    layout = TextLayout(
        key=settings.get("KEY", "text"),
        each=each,
        longest=command_line.count("LONGEST", settings.get("LONGEST", str(LONGEST_MIB))) << 20,
        limit=command_line.count_in(settings, "LIMIT"),
    )
    recipe = Recipe(
        check_name(settings["NAME"]),
        settings["INPUT"],
        layout,
        _rules(settings.get("RULES")),
        settings.get("TOKENIZER", "gpt2"),
        command_line.switch("APPEND_EOD", settings.get("APPEND_EOD", "1")),
    )
    return _done(prepare(recipe, _means(settings)))


def merge_sets(settings: Mapping[str, str]) -> int:
    """``make data-merge NAME=… FROM="a b"``: join data sets of one tokenizer."""
    from harness.data.merge import merge

    return _done(merge(settings["FROM"].replace(",", " ").split(), settings["NAME"]))


def clean_files(settings: Mapping[str, str]) -> int:
    """``make data-clean INPUT=… OUT=… RULES=…``: clean text without tokenising it."""
    from harness.data.clean import clean
    from harness.data.clean.pipeline import check_output
    from harness.data.clean.rules import load_rules

    files, out = local_files(settings["INPUT"]), expanded(settings["OUT"]).absolute()
    rules = load_rules(_rules(settings.get("RULES", "sv")))
    workers = command_line.count_in(settings, "WORKERS")
    check_output((), out, rules, force=True)
    with StageProgress() as progress, _as_json_lines(files, out, progress) as inputs:
        target = check_output(inputs, out, rules, force=settings.get("FORCE") == "1")
        report = clean(inputs, target, rules, progress.show, workers)
    if target != out:
        replace_folder(target, out)
    print(
        f"{report.documents_out:,} of {report.documents_in:,} documents kept, in {settings['OUT']}"
    )
    for rule, number in report.dropped.items():
        print(f"  {rule:18} dropped {number:>10,}")
    return 0


@contextmanager
def _as_json_lines(
    files: Sequence[TextFile], out: Path, progress: StageProgress
) -> Iterator[list[Path]]:
    """The files as JSON Lines, the only format that cleaning reads; converted next to ``out``."""
    from harness.data.documents import TextLayout
    from harness.data.json_lines import as_json_lines

    versions = [file.version for file in files]
    digest = hashlib.sha256(repr(versions).encode()).hexdigest()[:16]
    folder = out.with_name(f".{out.name}.text-{digest}")
    with told_if_unwritable(folder, "OUT"):
        paths, read, skipped = as_json_lines(files, TextLayout(), folder, progress.show)
        for path, (_, _, changed_ns) in zip(paths, versions, strict=True) if read else ():
            # An interrupted cleaning resumes only if its input has the same time of change.
            os.utime(path, ns=(changed_ns, changed_ns))
    progress.end()
    for rule, number in skipped.items():
        print(f"  skipped {number:,}: {READING[rule]}")
    yield paths
    shutil.rmtree(folder, ignore_errors=True)


def build_mappings(settings: Mapping[str, str]) -> int:
    """``data-mappings DATA=… SEQ=… SAMPLES=… SPLIT=… SEED=…``: build index mappings.

    The script of a run calls it on each node.
    """
    from harness.data.mappings import SampleRequest, build

    samples = tuple(
        command_line.count("SAMPLES", number, least=0) for number in settings["SAMPLES"].split(",")
    )
    if len(samples) != 3:
        raise UserError(
            f"SAMPLES={settings['SAMPLES']}: give numbers for training, validation and test"
        )
    seed = command_line.count("SEED", settings.get("SEED", "1234"), least=0)
    seq_length = command_line.count("SEQ", settings["SEQ"])
    use = SampleRequest(seq_length, samples, settings["SPLIT"], seed)
    chosen = blend(settings["DATA"])
    if written := build(chosen, use):
        print(f"{written} index mappings built in {chosen.cache}")
    return 0


def prepare_conversations(settings: Mapping[str, str]) -> int:
    """``make data-chat NAME=… INPUT=chat.jsonl``: prepare conversations; answers are learned."""
    from harness.data.chat.prepare import prepare_chat, tell

    source, tokenizer = expanded(settings["INPUT"]), settings.get("TOKENIZER", "gpt2")
    manifest, skipped = prepare_chat(
        settings["NAME"], source, tokenizer, force=settings.get("FORCE") == "1"
    )
    tell(manifest, skipped)
    print(
        f"make 801 DATA={manifest.name} trains on it, make data-inspect NAME={manifest.name}"
        " shows it"
    )
    return 0


def _done(manifest: Manifest) -> int:
    print(
        f"{manifest.name}: {manifest.counted.documents:,} documents, {manifest.counted.tokens:,}"
        " tokens"
    )
    print(*manifest.lines(), sep="\n")
    print(
        f"make 101 DATA={manifest.name} trains on it, make data-inspect NAME={manifest.name}"
        " shows it"
    )
    return 0


def _state(name: str) -> str:
    try:
        chosen = find(name)
    except UserError:
        return "damaged: make data-check says how"
    return f"{chosen.documents:>12,} documents {amount(chosen.tokens, ''):>7} tokens"


def _means(settings: Mapping[str, str]):
    from harness.data.prepare import Means

    return Means(
        mirror=expanded(settings["HUB"]) if "HUB" in settings else None,
        workers=command_line.count_in(settings, "WORKERS"),
        force=settings.get("FORCE") == "1",
    )


def _rules(wanted: str | None) -> Path | None:
    """The file that ``RULES=`` names: data/rules-<RULES>.yaml, or a path."""
    if wanted is None:
        return None
    by_name = {path.stem.removeprefix("rules-"): path for path in DATA.glob("rules-*.yaml")}
    path = by_name.get(wanted, expanded(wanted))
    if not path.is_file():
        raise UserError(f"RULES={wanted}: {nearest(wanted, by_name)}\nor give a file of rules")
    return path


def _name(settings: Mapping[str, str]) -> str:
    if "NAME" not in settings:
        raise UserError(
            f"NAME missing: one of {', '.join(prepared_names()) or 'none yet; make data-list'}"
        )
    return settings["NAME"]
