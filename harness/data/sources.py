"""Brings text here: finds the user's files, downloads those of the Hugging Face hub."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

from harness.data.definitions import Hub
from harness.data.documents import TextFile, text_file
from harness.errors import UserError, first_line
from harness.system.files import expanded

HUB_TIMEOUT_S = 10


def local_files(wanted: str) -> tuple[TextFile, ...]:
    """The files of ``INPUT=wanted``: a file, a folder with all below it, a pattern, or several.

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
                    f"INPUT={word}: no .jsonl, .parquet or .txt file in this folder, compressed or"
                    " not"
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


def download(
    hub: Hub, limit: int | None, mirror: Path | None, say: Callable[[str], None]
) -> tuple[tuple[TextFile, ...], str | None]:
    """Download the files of ``hub`` into the cache of Hugging Face's packages, unless it has them.

    Args:
        limit: rows that are needed; of Parquet, no more files are downloaded than hold them.
        mirror: a folder with a copy of the repository, at <mirror>/<owner>/<name>, to use instead
            of the hub.

    Returns:
        the files, and the hub's commit; None from a mirror.

    Raises:
        UserError: the hub or the repository cannot be reached, or has no such files.
    """
    if mirror is None:
        _reach_hub(hub)
    elif not (mirror / hub.repository).is_dir():
        raise UserError(f"HUB={mirror} has no {hub.repository}/ with {hub.files}")
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
    return tuple(files), commit


def _reach_hub(hub: Hub) -> None:
    """Fail within seconds if the hub cannot be reached; its client retries for half a minute."""
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
