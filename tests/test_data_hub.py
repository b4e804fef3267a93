"""Downloading: the real clients against a small server that answers as the Hugging Face hub does."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from harness import ROOT

pyarrow = pytest.importorskip("pyarrow", reason="the set-up stage `data` is not installed")
pytest.importorskip("datasets", reason="the set-up stage `data` is not installed")

COMMIT = "c" * 40


class FakeHub(ThreadingHTTPServer):
    """Serves <folder>/<owner>/<name>/… as repositories of one commit; ``asked``: the files that were downloaded."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folder = folder
        self.asked: list[str] = []
        self.gated = False


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].replace("%2F", "/").strip("/").split("/")
        if (
            parts[:2] == ["api", "datasets"]
            and (home := self.server.folder / "/".join(parts[2:4])).is_dir()
        ):
            if parts[4:5] == ["tree"]:
                return self._tree(home, "/".join(parts[6:]))
            return self._say(
                200, {"id": "/".join(parts[2:4]), "sha": COMMIT, "private": False, "siblings": []}
            )
        if parts[0] == "datasets" and "resolve" in parts:
            return self._file(
                self.server.folder / "/".join(parts[1:3]),
                "/".join(parts[parts.index("resolve") + 2 :]),
            )
        return self._say(404, {}, **{"X-Error-Code": "RepoNotFound"})

    def _tree(self, home: Path, below: str) -> None:
        rows = [
            {
                "type": "file" if path.is_file() else "directory",
                "oid": "0" * 40,
                "size": path.stat().st_size,
                "path": str(path.relative_to(home)),
            }
            for path in sorted((home / below).iterdir())
        ]
        self._say(200, rows)

    def _file(self, home: Path, name: str) -> None:
        if self.server.gated:
            return self._say(403, {}, **{"X-Error-Code": "GatedRepo"})
        if not (home / name).is_file():
            return self._say(404, {}, **{"X-Error-Code": "EntryNotFound"})
        content = (home / name).read_bytes()
        if self.command == "GET":
            self.server.asked.append(name)
        etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
        return self._say(
            200, content, **{"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        )

    def _say(self, status: int, content: object, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **headers,
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path) -> Iterator[FakeHub]:
    from pyarrow import parquet

    home = tmp_path / "hub" / "someone" / "texts"
    (home / "data").mkdir(parents=True)
    for number in range(3):
        rows = [f"{number} {row}" for row in range(20)]
        parquet.write_table(
            pyarrow.table({"text": rows}), home / "data" / f"train-{number}.parquet"
        )
    (home / "texts.py").write_text("raise SystemExit('a loading script was run')\n")
    server = FakeHub(tmp_path / "hub")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def prepare(
    hub: FakeHub,
    tmp_path: Path,
    limit: int | None = None,
    revision: str = "refs/convert/parquet",
    force: bool = False,
) -> dict:
    """Prepare in a process of its own, which learns of the hub as users tell it: by HF_ENDPOINT."""
    code = f"""
from pathlib import Path
from harness.data.documents import TextLayout
from harness.data.prepare import Means, Recipe, prepare
from harness.data.definitions import Hub
from harness.errors import UserError
hub = Hub(repository="someone/texts", revision={revision!r}, files="data/train-*.parquet", gated=True)
try:
    recipe = Recipe("mine", hub, TextLayout(limit={limit}), tokenizer="null:100")
    print(prepare(recipe, Means(folder=Path({str(tmp_path / "data")!r}), force={force})).model_dump_json())
except UserError as error:
    import json
    print(json.dumps(dict(error=str(error))))
"""
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
    }
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_is_downloaded_is_noted_with_the_commit_and_not_downloaded_again(hub, tmp_path):
    manifest = prepare(hub, tmp_path)
    assert manifest["source"]["commit"] == COMMIT
    assert [file["name"] for file in manifest["source"]["files"]] == [
        f"data/train-{n}.parquet" for n in range(3)
    ]
    first = hub.folder / "someone" / "texts" / "data" / "train-0.parquet"
    assert (
        manifest["source"]["files"][0]["sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    )
    assert manifest["counted"]["documents"] == 60
    assert sorted(hub.asked) == [f"data/train-{n}.parquet" for n in range(3)]
    assert "FORCE=1" in prepare(hub, tmp_path, limit=25)["error"]
    assert prepare(hub, tmp_path, limit=25, force=True)["counted"]["documents"] == 25
    assert len(hub.asked) == 3


def test_only_what_the_limit_needs_is_downloaded(hub, tmp_path):
    assert prepare(hub, tmp_path, limit=20)["counted"]["documents"] == 20
    assert hub.asked == ["data/train-0.parquet"]


def test_a_gated_repository_is_named_with_the_way_in(hub, tmp_path):
    hub.gated = True
    error = prepare(hub, tmp_path)["error"]
    assert "someone/texts" in error
    assert "accept its conditions" in error
    assert not (tmp_path / "data" / "mine").exists()
