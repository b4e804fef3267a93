"""Prepare a data set: bring its text, clean it where it says so, tokenise, check, publish.

    data/<name>/work/synthetic-…/   text that was made here
    data/<name>/work/text-…/        the source as JSON Lines, where cleaning needs it and it is
                                    something else
    data/<name>/work/clean-…/       what cleaning left, and samples of what it dropped; stays
    data/<name>/work/tokens-…/      the pair while it is written

Each stage goes on where it was killed and appears whole or not at all; the names end in a checksum
of all that decides what is in them. The manifest is written last. A data set that is there is
replaced only where that is asked for (FORCE=1), once the new one is whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import ROOT
from harness.data import indexed
from harness.data.data_sets import DATA, check_name, find, prefix_of
from harness.data.documents import Layout, TextFile, text_file
from harness.data.header import bin_path, idx_path
from harness.data.manifest import FILE as MANIFEST
from harness.data.manifest import (
    Cleaned,
    Counted,
    Manifest,
    Source,
    SourceFile,
    TokenizerUsed,
    Written,
    noted,
    read_manifest,
)
from harness.data.progress import StageProgress
from harness.data.sources import Definition, Hub, Synthetic, download, local_files
from harness.data.tokenize import Done, Job, Watched, tokenize
from harness.data.tokenizer import Tokenizer, find_tokenizer
from harness.errors import UserError
from harness.machine.provenance import package_version, source_commit
from harness.system.files import sync_tree, write_json

_VERSIONS = (
    "numpy",
    "orjson",
    "gigatoken",
    "tokenizers",
    "transformers",
    "sentencepiece",
    "pyarrow",
    "datasets",
)

TEXT = Layout()
_OWN = re.compile(r"(synthetic|text|clean|tokens|source)-[0-9a-f]+(\.json)?|\..*\.tmp")
"""Names in work/."""


@dataclass(frozen=True)
class Recipe:
    """All that decides a data set.

    Attributes:
        source: a repository of the hub, text to be made, or what ``INPUT=`` names.
        layout: how documents lie in its files.
        rules: a file of cleaning rules, where it is to be cleaned.
        tokenizer: see ``find_tokenizer``.
    """

    name: str
    source: Hub | Synthetic | str
    layout: Layout = TEXT
    rules: Path | None = None
    tokenizer: str = "gpt2"
    append_eod: bool = True


@dataclass(frozen=True)
class Means:
    """How it is prepared: where data sets lie, a copy of the hub, threads, and whether to do again
    what is done."""

    folder: Path = DATA
    mirror: Path | None = None
    workers: int | None = None
    force: bool = False


USUAL = Means()


def recipe_of(known: Definition) -> Recipe:
    """The recipe of a data set of data/datasets.yaml."""
    rules = DATA / f"rules-{known.clean}.yaml" if known.clean else None
    layout = Layout(key=known.key, limit=known.limit)
    return Recipe(known.name, known.hub or known.synthetic, layout, rules, known.tokenizer)


def prepare(
    recipe: Recipe, means: Means = USUAL, progress: StageProgress | None = None
) -> Manifest:
    """Prepare the data set of ``recipe`` and return its manifest; what is prepared already stays.

    Raises:
        UserError: the text, the tokenizer or the rules cannot be had, another process prepares this
            name, or the disk is full, or the name has another data set and ``means`` does not force
            it.
    """
    progress = progress or StageProgress()
    home = means.folder / check_name(recipe.name)
    try:
        with only_one(home, recipe.name):
            return _Preparation(recipe, means, home, progress).run()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = (
            "make room and start again: it goes on where it stopped"
            if full
            else "mend that and start again"
        )
        raise UserError(
            f"preparing {recipe.name} in {home}: {error.strerror or error}\n{way_out}"
        ) from None
    finally:
        progress.end()


class _Preparation:
    """One preparation, of a name that no other process prepares."""

    def __init__(self, recipe: Recipe, means: Means, home: Path, progress: StageProgress) -> None:
        self.recipe, self.means, self.home, self.progress = recipe, means, home, progress
        self.work = home / "work"
        self.seconds: dict[str, float] = {}
        self.asked = _asked(recipe.source)
        self.source_key = _digest(self.asked, asdict(recipe.layout))
        self.clean_key = (
            _digest(self.source_key, _rules_text(recipe.rules)) if recipe.rules else None
        )
        self.kept = (
            {f"source-{self.source_key}.json", f"clean-{self.clean_key}"} if recipe.rules else set()
        )

    def run(self) -> Manifest:
        tokenizer = find_tokenizer(self.recipe.tokenizer, self.means.folder / "tokenizers")
        key = _digest(
            self.source_key,
            self.clean_key,
            tokenizer.kind,
            tokenizer.sha256,
            self.recipe.append_eod,
        )
        if not self.means.force and (found := self._there(key)):
            self.progress.say(f"{self.recipe.name} is prepared already; FORCE=1 prepares it again")
            return found
        tokens = self.work / f"tokens-{key}"
        same = self._is_same(key)
        if not self.means.force and not same and self._finished(tokens) is None:
            check_free(self.recipe.name, self.means.folder)
        if tokenizer.slow_because:
            self.progress.say(
                f"{tokenizer.name} is tokenised by {tokenizer.by}, slowly: {tokenizer.slow_because}"
            )
        own = {f"{stage}-{self.source_key}" for stage in ("synthetic", "text")} | {tokens.name}
        # forced, what is done is done again; but the replacement of another set goes on where it
        # was interrupted
        self._clear(set() if self.means.force and same else self.kept | own)
        manifest = self._finished(tokens)
        if manifest is None:
            source, files, layout, cleaned = self._text()
            done = self._tokenize(tokens, files, layout, tokenizer)
            if cleaned is None:
                source = source.model_copy(update={"files": _files(files, done.source_sha256)})
            manifest = self._manifest(key, source, cleaned, done, tokenizer, tokens)
            write_json(tokens / "done.json", manifest.model_dump(mode="json"))
        self._publish(tokens, manifest, tokenizer)
        self._clear(self.kept)
        return manifest

    def _there(self, key: str) -> Manifest | None:
        """The manifest of the data set where it is what is wanted, and whole."""
        with contextlib.suppress(UserError):
            manifest = read_manifest(self.home)
            if manifest and manifest.recipe == key:
                find(self.recipe.name, self.means.folder)
                return manifest
        return None

    def _is_same(self, key: str) -> bool:
        """Whether what is there, damaged or not, is an earlier preparation of the same recipe."""
        with contextlib.suppress(UserError):
            manifest = read_manifest(self.home)
            return manifest is not None and manifest.recipe == key
        return False

    def _text(self) -> tuple[Source, tuple[TextFile, ...], Layout, Cleaned | None]:
        """The source, and the files to tokenise: its own, or what cleaning left of them."""
        if self.recipe.rules is None:
            source, files = self._source()
            return source, files, self.recipe.layout, None
        from harness.data.clean.pipeline import CleanReport, clean
        from harness.data.clean.rules import load_rules

        rules = load_rules(self.recipe.rules)
        folder, source_file = (
            self.work / f"clean-{self.clean_key}",
            self.work / f"source-{self.source_key}.json",
        )
        known = noted(source_file, Source), noted(folder / "manifest.json", CleanReport)
        if all(known):
            source, report = known
        else:
            source, files = self._source()
            source, paths = self._json_lines(source, files)
            self.work.mkdir(exist_ok=True)
            write_json(source_file, source.model_dump(mode="json"))
            with self._timed("clean"):
                report = clean(paths, folder, rules, self.progress.show, self.means.workers)
        if not report.documents_out:
            dropped = ", ".join(
                f"{number:,} {rule}" for rule, number in report.dropped.items() if number
            )
            raise UserError(
                f"{self.recipe.rules.name} dropped all {report.documents_in:,} documents:"
                f" {dropped}\n{folder / 'dropped'}/ shows which and why; set other RULES=, or none"
            )
        described = {
            name: getattr(report, name) for name in Cleaned.model_fields if name != "rules"
        }
        shards = tuple(text_file(folder / shard.name, shard.name) for shard in report.shards)
        return source, shards, TEXT, Cleaned(rules=self.recipe.rules.name, **described)

    def _source(self) -> tuple[Source, tuple[TextFile, ...]]:
        """Bring or make the text. The checksums of its files are not yet known."""
        match self.recipe.source:
            case Hub() as hub:
                with self._timed("download"):
                    got = download(
                        hub, self.recipe.layout.limit, self.means.mirror, self.progress.say
                    )
                return Source(kind="hub", asked=self.asked, commit=got.commit), got.files
            case Synthetic() as wanted:
                from harness.data import synthetic

                corpus = synthetic.Corpus(wanted.seed, getattr(synthetic, wanted.mixture.upper()))
                folder = self.work / f"synthetic-{self.source_key}"
                with self._timed("make"):
                    size = wanted.size_mb * 10**6
                    paths = synthetic.generate(
                        folder, size, corpus, self.means.workers, self.progress.show
                    )
                return Source(kind="synthetic", asked=self.asked), tuple(
                    text_file(path, path.name) for path in paths
                )
            case wanted:
                return Source(kind="files", asked=self.asked), local_files(wanted)

    def _json_lines(
        self, source: Source, files: tuple[TextFile, ...]
    ) -> tuple[Source, tuple[Path, ...]]:
        """The files as JSON Lines, which cleaning reads: themselves where they are that, else
        written anew."""
        layout = self.recipe.layout
        with self._timed("read"):
            if (
                layout.limit is None
                and layout.key == "text"
                and all(f.kind == "jsonl" and not f.packing for f in files)
            ):
                known = {file.name: _sha256(file.path) for file in files}
                paths, skipped = tuple(file.path for file in files), Counter()
            else:
                from harness.data.json_lines import write_json_lines

                folder = self.work / f"text-{self.source_key}"
                paths, shards = write_json_lines(files, layout, folder, self.progress.show)
                known = {shard.name: shard.sha256 for shard in shards}
                skipped = sum((Counter(shard.skipped) for shard in shards), Counter())
        return (
            source.model_copy(update={"files": _files(files, known), "skipped": dict(skipped)}),
            paths,
        )

    def _tokenize(
        self, folder: Path, files: tuple[TextFile, ...], layout: Layout, tokenizer: Tokenizer
    ) -> Done:
        job = Job(
            files, layout, tokenizer, self.recipe.append_eod, prefix_of(self.recipe.name, folder)
        )
        job.prefix.parent.mkdir(parents=True, exist_ok=True)

        def watch(now: Watched) -> None:
            self.progress.show(
                "tokenise", now.read_bytes, now.all_bytes, f"{now.tokens / 1e6:,.1f} M tokens"
            )

        try:
            with self._timed("tokenise"):
                done = tokenize(job, watch, self.means.workers)
                indexed.check_pair(job.prefix)
        except UserError:
            with contextlib.suppress(OSError):  # what can go on stays
                job.prefix.parent.rmdir()
                discard(folder)
            raise
        if not done.counts.tokens:
            discard(folder)
            raise UserError(
                f"no text to train on: {done.counts.documents:,} documents, and all of them are"
                " empty"
            )
        return done

    def _manifest(
        self,
        key: str,
        source: Source,
        cleaned: Cleaned | None,
        done: Done,
        tokenizer: Tokenizer,
        folder: Path,
    ) -> Manifest:
        prefix = prefix_of(self.recipe.name, folder)
        return Manifest(
            name=self.recipe.name,
            recipe=key,
            created=time.time(),
            source=source,
            cleaned=cleaned,
            counted=Counted(**asdict(done.counts)),
            tokenizer=tokenizer_used(tokenizer, tokenizer.by),
            append_eod=self.recipe.append_eod,
            written=written(prefix, indexed.best_dtype(tokenizer.vocab_size).name, done.pair),
            seconds={stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            versions={"python": platform.python_version(), "harness": source_commit(ROOT)[0]}
            | {name: package_version(name) for name in _VERSIONS},
        )

    def _finished(self, folder: Path) -> Manifest | None:
        """The manifest of a pair that an earlier process finished but did not, or not wholly,
        publish."""
        manifest = noted(folder / "done.json", Manifest)
        if manifest is None:
            return None
        for source, target, size in self._moves(folder, manifest):
            path = source if source.exists() else target
            if not path.exists() or path.stat().st_size != size:
                return None
        return manifest

    def _publish(self, folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
        """Put the new pair in the place of an old one; stopped half-way there is none until it goes
        on."""
        (self.home / MANIFEST).unlink(missing_ok=True)
        moves = self._moves(folder, manifest)
        if all(source.exists() for source, _, _ in moves):
            idx_path(prefix_of(self.recipe.name, self.means.folder)).unlink(missing_ok=True)
        tokenizer.install(self.home / "tokenizer")
        for source, target, _ in moves:
            if source.exists():
                source.replace(target)
        shutil.rmtree(self.home / "cache", ignore_errors=True)
        sync_tree(self.home / "tokenizer")
        manifest.write(self.home)

    def _moves(self, folder: Path, manifest: Manifest) -> tuple[tuple[Path, Path, int], ...]:
        """From, to, bytes: .bin, then .idx."""
        old, new = (
            prefix_of(self.recipe.name, folder),
            prefix_of(self.recipe.name, self.means.folder),
        )
        written = manifest.written
        return (
            (bin_path(old), bin_path(new), written.bin_bytes),
            (idx_path(old), idx_path(new), written.idx_bytes),
        )

    def _clear(self, keep: set[str]) -> None:
        """Leave only these in work/, of what preparations write there."""
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


def check_free(name: str, folder: Path) -> None:
    """Raise UserError where ``folder`` has a data set ``name``, or a part of one, or a tokenizer
    there; say what it is."""
    home, prefix = folder / name, prefix_of(name, folder)
    there = [
        path for path in (idx_path(prefix), home / MANIFEST, home / "tokenizer") if path.exists()
    ]
    if not there:
        return
    try:
        manifest = read_manifest(home)
    except UserError:
        manifest = None
    if manifest is None:
        what = f"{there[0]} is there, without a manifest that says how it was made"
    else:
        what = (
            f"it has {manifest.counted.tokens:,} tokens, {manifest.origin}, tokenizer"
            f" {manifest.tokenizer.name}"
        )
    raise UserError(
        f"NAME={name} is prepared already, from other input or with other settings: {what}\n"
        "NAME=… prepares another data set; FORCE=1 replaces this one once the new one is whole"
    )


def publish(part: Path, home: Path, manifest: Manifest) -> None:
    """Put the pair and the tokenizer in ``part`` in the place of those in ``home``, and the
    manifest last."""
    old, new = prefix_of(manifest.name, part), prefix_of(manifest.name, home.parent)
    (home / MANIFEST).unlink(missing_ok=True)
    idx_path(new).unlink(missing_ok=True)
    for path in (bin_path, idx_path):
        path(old).replace(path(new))
    shutil.rmtree(home / "tokenizer", ignore_errors=True)
    (part / "tokenizer").replace(home / "tokenizer")
    shutil.rmtree(home / "cache", ignore_errors=True)
    sync_tree(home / "tokenizer")
    manifest.write(home)


def discard(part: Path) -> None:
    """Remove ``part``, a folder in work/, and work/ itself where nothing else is in it."""
    shutil.rmtree(part, ignore_errors=True)
    with contextlib.suppress(OSError):
        part.parent.rmdir()


@contextlib.contextmanager
def only_one(home: Path, name: str) -> Iterator[None]:
    """Hold the folder of ``name``, which exists while it is held; another process that wants it
    gets a UserError."""
    path = home / ".lock"
    while True:
        home.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                other = lock.read().strip() or "?"
                raise UserError(
                    f"process {other} prepares {name} already\nwait for it, or give another NAME="
                ) from None
            if path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino:
                lock.truncate(0)
                lock.write(str(os.getpid()))
                lock.flush()
                try:
                    yield
                finally:
                    path.unlink()
                    with contextlib.suppress(OSError):
                        home.rmdir()
                return


def tokenizer_used(tokenizer: Tokenizer, by: str) -> TokenizerUsed:
    """What a manifest says of ``tokenizer``; ``by`` is the package that made the ids."""
    return TokenizerUsed(
        type=tokenizer.kind,
        name=tokenizer.name,
        sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        by=by,
    )


def written(prefix: Path, dtype: str, pair: indexed.Pair) -> Written:
    """What a manifest says of the finished ``pair`` at ``prefix``."""
    return Written(
        dtype=dtype,
        bin_bytes=bin_path(prefix).stat().st_size,
        bin_sha256=pair.bin_sha256,
        idx_bytes=idx_path(prefix).stat().st_size,
        idx_sha256=pair.idx_sha256,
    )


def _asked(source: Hub | Synthetic | str) -> dict[str, Any]:
    if isinstance(source, str):
        stats = [(str(file.path), file.path.stat()) for file in local_files(source)]
        return {
            "input": source,
            "files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        }
    return source.model_dump(mode="json")


def _rules_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"rules {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"rules {path}: no text in UTF-8") from None


def _files(files: tuple[TextFile, ...], sha256: Mapping[str, str | None]) -> tuple[SourceFile, ...]:
    return tuple(
        SourceFile(name=f.name, bytes=f.path.stat().st_size, sha256=sha256.get(f.name))
        for f in files
    )


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
