"""Prepares a data set: gets its text, cleans it if asked to, tokenises, checks and publishes it.

    data/<name>/work/synthetic-…/   generated text
    data/<name>/work/text-…/        the source as JSON Lines, if cleaning needs it in that format
    data/<name>/work/clean-…/       the cleaned text, and samples of what was dropped; kept
    data/<name>/work/tokens-…/      the .bin/.idx pair while it is written

The names end in a checksum of everything that determines the content. A stage resumes where it was
killed; its result appears complete or not at all. The manifest is written last. An existing data
set is replaced only with FORCE=1, once the new one is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import ROOT
from harness.data import indexed
from harness.data.clean.rules import load_rules
from harness.data.data_sets import find
from harness.data.definitions import Definition, Hub, Synthetic
from harness.data.disk import resumable
from harness.data.documents import TextFile, TextLayout, text_file
from harness.data.header import bin_path, idx_path, sha256
from harness.data.json_lines import as_json_lines
from harness.data.manifest import (
    Cleaned,
    Manifest,
    SourceFile,
    TextSource,
    by_rule,
    noted,
    read_manifest,
)
from harness.data.names import DATA, check_name, prefix_of
from harness.data.progress import StageProgress
from harness.data.publishing import (
    check_free,
    discard,
    only_one,
    publish,
    tokenizer_used,
    written,
)
from harness.data.sources import download, local_files
from harness.data.tokenize import Done, Job, tokenize
from harness.data.tokenizer import Tokenizer, find_tokenizer, versions
from harness.errors import UserError
from harness.machine.provenance import package_version, source_commit
from harness.system.files import write_json

_VERSIONS = ("numpy", "orjson", "pyarrow", "datasets")

TEXT = TextLayout()
_OWN = re.compile(r"(synthetic|text|clean|tokens|source)-[0-9a-f]+(\.json)?|\..*\.tmp")
"""Names in work/."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a data set.

    Attributes:
        source: a repository of the hub, text to generate, or the value of ``INPUT=``.
        layout: how documents are stored in its files.
        rules: a file of cleaning rules; None: the text is not cleaned.
        tokenizer: see ``find_tokenizer``.
    """

    name: str
    source: Hub | Synthetic | str
    layout: TextLayout = TEXT
    rules: Path | None = None
    tokenizer: str = "gpt2"
    append_eod: bool = True


@dataclass(frozen=True)
class Means:
    """How to prepare it, which does not change the result.

    Attributes:
        folder: where data sets lie.
        mirror: a local copy of the hub's repositories.
        workers: threads or processes; by default one a core.
        force: prepare it again, and replace another data set of this name.
    """

    folder: Path = DATA
    mirror: Path | None = None
    workers: int | None = None
    force: bool = False


USUAL = Means()


def recipe_of(known: Definition) -> Recipe:
    """The recipe of a data set of data/datasets.yaml."""
    rules = DATA / f"rules-{known.clean}.yaml" if known.clean else None
    layout = TextLayout(key=known.key, limit=known.limit)
    return Recipe(known.name, known.hub or known.synthetic, layout, rules, known.tokenizer)


def prepare(
    recipe: Recipe, means: Means = USUAL, progress: StageProgress | None = None
) -> Manifest:
    """Prepare the data set of ``recipe``, unless it is prepared already, and return its manifest.

    Raises:
        UserError: the text, tokenizer or rules are missing, another process prepares this name,
            the disk is full, or the name belongs to another data set and ``means.force`` is off.
    """
    progress = progress or StageProgress()
    home = means.folder / check_name(recipe.name)
    with progress, resumable(f"preparing {recipe.name} in {home}"), only_one(home, recipe.name):
        return _Preparation(recipe, means, home, progress).run()


class _Preparation:
    """One preparation, under the lock of its name."""

    def __init__(self, recipe: Recipe, means: Means, home: Path, progress: StageProgress) -> None:
        self.recipe, self.means, self.home, self.progress = recipe, means, home, progress
        self.work = home / "work"
        self.seconds: dict[str, float] = {}
        self.asked = _asked(recipe.source)
        self.source_key = _digest(self.asked, asdict(recipe.layout))
        self.clean_key, self.kept = None, set()
        if recipe.rules:
            self.rules = load_rules(recipe.rules)
            self.clean_key = _digest(self.source_key, self.rules.dump())
            self.kept = {f"source-{self.source_key}.json", f"clean-{self.clean_key}"}

    def run(self) -> Manifest:
        tokenizer = find_tokenizer(self.recipe.tokenizer, self.means.folder / "tokenizers")
        text_key = self.source_key, self.clean_key
        key = _digest(*text_key, tokenizer.kind, tokenizer.sha256, self.recipe.append_eod)
        name, force = self.recipe.name, self.means.force
        published = self._published(key)
        if published and not force:
            with contextlib.suppress(UserError):  # a damaged one is prepared again
                find(name, self.means.folder)
                self.progress.say(f"{name} is prepared already; FORCE=1 prepares it again")
                return published
        tokens = self.work / f"tokens-{key}"
        if not published and not force and self._finished(tokens) is None:
            check_free(name, self.means.folder)
        if tokenizer.slow_because:
            self.progress.say(
                f"tokenising with {tokenizer.by}, which is slow: {tokenizer.slow_because}"
            )
        own = {f"{stage}-{self.source_key}" for stage in ("synthetic", "text")} | {tokens.name}
        # FORCE=1 redoes finished stages of the same recipe. A different recipe is the interrupted
        # replacement of another data set, which resumes.
        self._clear(set() if force and published else self.kept | own)
        manifest = self._finished(tokens)
        if manifest is None:
            manifest = self._make(key, tokenizer, tokens)
            write_json(tokens / "done.json", manifest.model_dump(mode="json"))
        publish(tokens, self.home, manifest, tokenizer)
        self._clear(self.kept)
        return manifest

    def _published(self, key: str) -> Manifest | None:
        """The manifest of the published data set, damaged or not, if it is of this recipe."""
        with contextlib.suppress(UserError):
            manifest = read_manifest(self.home)
            if manifest and manifest.recipe == key:
                return manifest
        return None

    def _text(self) -> tuple[TextSource, tuple[TextFile, ...], TextLayout, Cleaned | None]:
        """The source, and the files to tokenise: its own, or the cleaned ones."""
        if self.recipe.rules is None:
            source, files = self._source()
            return source, files, self.recipe.layout, None
        from harness.data.clean.pipeline import CleanReport, clean

        folder = self.work / f"clean-{self.clean_key}"
        source_file = self.work / f"source-{self.source_key}.json"
        known = noted(source_file, TextSource), noted(folder / "manifest.json", CleanReport)
        if all(known):
            source, report = known
        else:
            source, files = self._source()
            source, paths = self._json_lines(source, files)
            self.work.mkdir(exist_ok=True)
            write_json(source_file, source.model_dump(mode="json"))
            with self._timed("clean"):
                report = clean(paths, folder, self.rules, self.progress.show, self.means.workers)
        if not report.documents_out:
            raise UserError(
                f"{self.recipe.rules.name} dropped all {report.documents_in:,} documents:"
                f" {by_rule(report.dropped)}\n{folder / 'dropped'}/ shows which and why; set other"
                " RULES=, or none"
            )
        shards = tuple(text_file(folder / shard.name, shard.name) for shard in report.shards)
        cleaned = Cleaned.model_validate(report.model_dump() | {"rules": self.recipe.rules.name})
        return source, shards, TEXT, cleaned

    def _source(self) -> tuple[TextSource, tuple[TextFile, ...]]:
        """Download, generate or find the text. The checksums of its files are not known yet."""
        match self.recipe.source:
            case Hub() as hub:
                limit = self.recipe.layout.limit
                with self._timed("download"):
                    files, commit = download(hub, limit, self.means.mirror, self.progress.say)
                return TextSource(kind="hub", asked=self.asked, commit=commit), files
            case Synthetic() as wanted:
                from harness.data.synthetic.corpus import MIXTURES, Corpus
                from harness.data.synthetic.files import generate

                folder = self.work / f"synthetic-{self.source_key}"
                with self._timed("make"):
                    size = wanted.size_mb * 10**6
                    show, workers = self.progress.show, self.means.workers
                    corpus = Corpus(wanted.seed, MIXTURES[wanted.mixture])
                    paths = generate(folder, size, corpus, workers, show)
                files = tuple(text_file(path, path.name) for path in paths)
                return TextSource(kind="synthetic", asked=self.asked), files
            case wanted:
                return TextSource(kind="files", asked=self.asked), local_files(wanted)

    def _json_lines(
        self, source: TextSource, files: tuple[TextFile, ...]
    ) -> tuple[TextSource, list[Path]]:
        """The files as JSON Lines, the only format that cleaning reads; converted if necessary."""
        folder, layout = self.work / f"text-{self.source_key}", self.recipe.layout
        with self._timed("read"):
            paths, known, skipped = as_json_lines(files, layout, folder, self.progress.show)
            known = known or {file.name: sha256(file.path).hexdigest() for file in files}
        update = {"files": _files(files, known), "skipped": skipped}
        return source.model_copy(update=update), paths

    def _tokenize(
        self, folder: Path, files: tuple[TextFile, ...], layout: TextLayout, tokenizer: Tokenizer
    ) -> Done:
        prefix = prefix_of(self.recipe.name, folder)
        job = Job(files, layout, tokenizer, self.recipe.append_eod, prefix)
        prefix.parent.mkdir(parents=True, exist_ok=True)

        def watch(read_bytes: int, all_bytes: int, tokens: int) -> None:
            self.progress.show("tokenise", read_bytes, all_bytes, f"{tokens / 1e6:,.1f} M tokens")

        try:
            with self._timed("tokenise"):
                done = tokenize(job, watch, self.means.workers)
                indexed.check_pair(job.prefix)
        except UserError:
            with contextlib.suppress(OSError):  # parts that a later run can resume stay
                job.prefix.parent.rmdir()
                discard(folder)
            raise
        if not done.counts.tokens:
            discard(folder)
            raise UserError(
                f"no text to train on: all {done.counts.documents:,} documents are empty"
            )
        return done

    def _make(self, key: str, tokenizer: Tokenizer, folder: Path) -> Manifest:
        """Get the text and write its pair into ``folder``; returns the manifest."""
        source, files, layout, cleaned = self._text()
        done = self._tokenize(folder, files, layout, tokenizer)
        if cleaned is None:
            source = source.model_copy(update={"files": _files(files, done.source_sha256)})
        prefix = prefix_of(self.recipe.name, folder)
        return Manifest(
            name=self.recipe.name,
            recipe=key,
            created=time.time(),
            source=source,
            cleaned=cleaned,
            counted=done.counts,
            tokenizer=tokenizer_used(tokenizer, tokenizer.by),
            append_eod=self.recipe.append_eod,
            written=written(prefix, indexed.best_dtype(tokenizer.vocab_size).name, done.pair),
            seconds={stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            versions={"python": platform.python_version(), "harness": source_commit(ROOT)[0]}
            | {name: package_version(name) for name in _VERSIONS}
            | versions(),
        )

    def _finished(self, folder: Path) -> Manifest | None:
        """The manifest of a pair that an earlier process wrote, but did not completely publish."""
        manifest = noted(folder / "done.json", Manifest)
        if manifest is None:
            return None
        part = prefix_of(self.recipe.name, folder)
        published = prefix_of(self.recipe.name, self.means.folder)
        sizes = (bin_path, manifest.written.bin_bytes), (idx_path, manifest.written.idx_bytes)
        for path, size in sizes:
            found = path(part) if path(part).exists() else path(published)
            if not found.exists() or found.stat().st_size != size:
                return None
        return manifest

    def _clear(self, keep: set[str]) -> None:
        """Remove from work/ what preparations write there, except the names in ``keep``."""
        self.work.mkdir(exist_ok=True)
        for path in self.work.iterdir():
            if path.name not in keep and _OWN.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        with contextlib.suppress(OSError):
            self.work.rmdir()

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - begun
        self.progress.end()


def _asked(source: Hub | Synthetic | str) -> dict[str, Any]:
    if isinstance(source, str):
        return {"input": source, "files": [list(file.version) for file in local_files(source)]}
    return source.model_dump(mode="json")


def _files(files: tuple[TextFile, ...], sha256: Mapping[str, str | None]) -> tuple[SourceFile, ...]:
    return tuple(
        SourceFile(name=file.name, bytes=file.path.stat().st_size, sha256=sha256.get(file.name))
        for file in files
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
