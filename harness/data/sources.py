"""Where text comes from: the data sets of data/datasets.yaml, files of the user's, the Hugging Face
hub."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlparse

from pydantic import BaseModel, ConfigDict, Field, model_validator

from harness.data.data_sets import DATA, NAME
from harness.data.documents import TextFile, text_file
from harness.errors import UserError, first_line, nearest
from harness.system import yaml_files
from harness.system.files import expanded

FILE = DATA / "datasets.yaml"
HUB_TIMEOUT_S = 10


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Hub(_Frozen):
    """Files of a repository of the Hugging Face hub at a revision."""

    repository: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Annotated[str, Field(min_length=1)]
    files: Annotated[str, Field(min_length=1)]
    gated: bool = False


class Synthetic(_Frozen):
    """Text made by harness.data.synthetic."""

    mixture: Literal["plain", "damaged"] = "plain"
    seed: Annotated[int, Field(ge=0)] = 0
    size_mb: Annotated[int, Field(ge=1)]


class Definition(_Frozen):
    """A data set that can be prepared by its name.

    ``limit`` counts documents from the front, ``chat`` is a file in data/.
    """

    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    shows: Annotated[str, Field(min_length=1)]
    hub: Hub | None = None
    synthetic: Synthetic | None = None
    chat: Annotated[str, Field(pattern=r"^[\w.-]+\.jsonl$")] | None = None
    key: str = "text"
    limit: Annotated[int, Field(ge=1)] | None = None
    clean: str | None = None
    tokenizer: str = "gpt2"

    @model_validator(mode="after")
    def _one_source(self) -> Definition:
        if sum(source is not None for source in (self.hub, self.synthetic, self.chat)) != 1:
            raise ValueError("give either hub, synthetic or chat")
        return self


def definitions(path: Path = FILE) -> dict[str, Definition]:
    """Every data set that can be prepared by its name.

    Raises:
        UserError: the file is missing or is no YAML, or a key or value is wrong.
    """
    found = {}
    for name, row in (rows := yaml_files.read(path)).items():
        where = f"{path.name}: {name}"
        with yaml_files.entry(path, rows, name):
            yaml_files.word(name, f"{where}: its name", "openwebtext")
            found[name] = yaml_files.build(
                Definition, {"name": name, **yaml_files.mapping(row, where)}, where
            )
    return found


def definition(name: str) -> Definition:
    """The data set ``name``. Raises UserError naming the nearest ones."""
    known = definitions()
    if name not in known:
        raise UserError(
            f"no data set {name}; {nearest(name, known)}\n"
            "for your own text: make data-prepare NAME=… INPUT=file-or-folder"
        )
    return known[name]


def local_files(wanted: str) -> tuple[TextFile, ...]:
    """The files that ``INPUT=wanted`` names: a file, a folder with all below it, a pattern, or
    several of these.

    Raises:
        UserError: there are none, or one is of an unknown kind.
    """
    found: list[Path] = []
    for word in [wanted] if expanded(wanted).exists() else wanted.split():
        path = expanded(word)
        if path.is_dir():
            below = sorted(
                p
                for p in path.rglob("*")
                if p.is_file() and _is_known(p) and not p.name.startswith(".")
            )
            if not below:
                raise UserError(
                    f"INPUT={word}: no .jsonl, .parquet or .txt file in this folder, packed or not"
                )
            found += below
        elif path.is_file():
            found.append(path)
        elif matches := sorted(
            p for p in Path(path.anchor).glob(str(path.relative_to(path.anchor))) if p.is_file()
        ):
            found += matches
        else:
            raise UserError(f"INPUT={word}: no such file or folder, and nothing matches")
    return tuple(text_file(path.resolve(), str(path)) for path in found)


@dataclass(frozen=True)
class Downloaded:
    """Files of a hub's repository, here. ``commit`` is what the revision stood for, where that is
    known."""

    files: tuple[TextFile, ...]
    commit: str | None


def download(
    hub: Hub, limit: int | None, mirror: Path | None, say: Callable[[str], None]
) -> Downloaded:
    """Bring the files of ``hub`` here, into the cache of Hugging Face's packages; what is there
    already stays.

    Args:
        limit: no more files than are needed for so many rows of Parquet.
        mirror: a folder with a copy of the repository, at <mirror>/<owner>/<name>, to use instead
        of the hub.

    Raises:
        UserError: the hub or the repository cannot be reached, or has no such files.
    """
    if mirror is None:
        _reach_hub(hub)
    elif not (mirror / hub.repository).is_dir():
        raise UserError(f"HUB={mirror}: there is no {hub.repository}/ in it, with {hub.files}")
    from datasets import (
        DownloadConfig,
        DownloadManager,
        disable_progress_bars,
        load_dataset_builder,
    )

    disable_progress_bars()
    kind = "parquet" if hub.files.endswith(".parquet") else "json"
    try:
        if mirror is None:
            from huggingface_hub import HfApi

            commit = HfApi().dataset_info(hub.repository, revision=hub.revision).sha
            home = f"hf://datasets/{hub.repository}@{commit}"
        else:
            commit, home = None, str(mirror.resolve() / hub.repository)
        builder = load_dataset_builder(kind, data_files={"train": f"{home}/{hub.files}"})
        urls = [str(url) for url in builder.config.data_files["train"]]
        if not urls:
            raise FileNotFoundError("no such files")
        manager = DownloadManager(download_config=DownloadConfig(max_retries=5))
        files: list[TextFile] = []
        for number, url in enumerate(urls, 1):
            name = url.removeprefix(f"{home}/")
            say(f"{hub.repository}: {name} ({number} of {len(urls)})")
            files.append(text_file(Path(manager.download(url)), name))
            if limit is not None and _rows(files) >= limit:
                break
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise UserError(
            f"{hub.files} of {hub.repository} at {hub.revision}: {reason}\n{_way_out(hub)}"
        ) from None
    return Downloaded(tuple(files), commit)


def _reach_hub(hub: Hub) -> None:
    """Fail at once where the hub cannot be reached; its own client tries for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return
    place = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if any(name.lower() in ("https_proxy", "http_proxy", "all_proxy") for name in os.environ):
        return
    try:
        with socket.create_connection(
            (place.hostname, place.port or (443 if place.scheme == "https" else 80)), HUB_TIMEOUT_S
        ):
            pass
    except OSError as error:
        raise UserError(
            f"the hub {place.hostname} cannot be reached:"
            f" {error.strerror or error}\n{_way_out(hub)}"
        ) from None


def _way_out(hub: Hub) -> str:
    login = (
        "accept its conditions on the hub, then set HF_TOKEN or run `hf auth login`\n"
        if hub.gated
        else ""
    )
    return (
        f"{login}without a network: copy {hub.files} of {hub.repository} to"
        f" <folder>/{hub.repository}/\nand set HUB=<folder>; or make data-synthetic"
    )


def _rows(files: list[TextFile]) -> int:
    if files[-1].kind != "parquet":
        return 0
    from pyarrow.parquet import read_metadata

    return sum(read_metadata(file.path).num_rows for file in files)


def _is_known(path: Path) -> bool:
    try:
        text_file(path)
    except UserError:
        return False
    return True
