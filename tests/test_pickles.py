"""Pickles that hold code are refused by every reader, and what PyTorch and upstream save is read."""

import io
import json
import os
import pickle
import pickletools
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from checkpoint_files import Index, Info, Metadata, Object, Size, Tensor, as_torch_pickles, write

from harness.run import checkpoints, pickles

ROOT = Path(__file__).resolve().parent.parent
MAGIC = 0x1950A86A20F9469CFC6C


class Runs:
    """Pickled, it is a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def codes(command: str) -> dict[str, bytes]:
    """Pickles that would run ``command``, or reach for more than data, each in another way."""
    call = text(command) + b"\x85R."
    return {
        "protocol 0": f"cos\nsystem\n(S'{command}'\ntR.".encode(),
        "inst": f"(S'{command}'\nios\nsystem\n.".encode(),
        "obj": b"(cos\nsystem\n" + text(command) + b"o.",
        "protocol 4": pickle.dumps(Runs(command), 4),
        "in a list in a dict": pickle.dumps({"a": [1, {"b": Runs(command)}]}, 5),
        "memoized names": b"\x80\x04"
        + short("os")
        + b"\x94"
        + short("system")
        + b"\x940"
        + b"0h\x00h\x01\x93"
        + call,
        "names put and fetched": b"\x80\x02"
        + text("system")
        + b"q\x050"
        + text("os")
        + b"h\x05\x93"
        + call,
        "names from a popped list": b"\x80\x04]("
        + short("os")
        + b"\x94"
        + short("system")
        + b"\x94e0h\x00h\x01\x93"
        + call,
        "eval": b"c__builtin__\neval\n" + text(f"__import__('os').system({command!r})") + b"\x85R.",
        "getattr": b"cbuiltins\ngetattr\n(cargparse\nNamespace\n" + text("__init__") + b"tR.",
        "a dotted name": b"\x80\x04" + short("torch") + short("os.system") + b"\x93" + call,
        "a dotted name of a data class": b"\x80\x04"
        + short("argparse")
        + short("Namespace.__init__.__globals__")
        + b"\x93.",
        "a name that only looks like a dtype": b"ctorch\nfloat32.__class__\n.",
        "another function of a module of data": b"ctorch._utils\n_import_dotted_name\n" + call,
        "partial": b"cfunctools\npartial\n(cos\nsystem\n" + text(command) + b"tR.",
        "an extension": b"\x80\x02\x82\x01" + call,
        "a class that is changed": b"\x80\x02cargparse\nNamespace\n}"
        + text("__reduce__")
        + b"K\x01sb.",
        "a pickle in a pickle": b"ctorch.storage\n_load_from_bytes\n"
        + b"B"
        + len(inner := pickle.dumps(Runs(command))).to_bytes(4, "little")
        + inner
        + b"\x85R.",
        "no pickle": b"PRECIOUS",
        "cut off": pickle.dumps({"a": 1})[:-1],
        "a second pickle": pickle.dumps({"a": 1}) + pickle.dumps(Runs(command)),
    }


WAYS = sorted(codes("true"))


def archive(pickled: bytes, *more: tuple[str, bytes]) -> bytes:
    """A file as torch.save writes it, with ``pickled`` in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        for name, content in [("archive/data.pkl", pickled), ("archive/version", b"3\n"), *more]:
            members.writestr(name, content)
    return file.getvalue()


def legacy(pickled: bytes) -> bytes:
    """A file as PyTorch before 1.6 wrote it."""
    return (
        b"".join(pickle.dumps(value, 2) for value in (MAGIC, 1001, {"little_endian": True}))
        + pickled
        + pickle.dumps([], 2)
    )


@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, way):
    ran = tmp_path / "ran"
    code = codes(f"touch {ran}")[way]
    path = tmp_path / "file.pt"
    for content in (code, *([archive(code), legacy(code)] if way != "a second pickle" else [])):
        path.write_bytes(content)
        with pytest.raises(pickles.NotData, match=r"file\.pt"):
            pickles.check_file(path)
    assert not ran.exists()


def test_ways_run_where_nothing_refuses_them(tmp_path):
    """The pickles of these tests are real ones."""
    for way in (
        "protocol 0",
        "inst",
        "obj",
        "protocol 4",
        "memoized names",
        "names put and fetched",
        "eval",
        "names from a popped list",
    ):
        ran = tmp_path / way.replace(" ", "-")
        pickle.loads(codes(f"touch {ran}")[way])
        assert ran.exists(), way
        assert list(pickletools.genops(codes("true")[way]))


@pytest.mark.parametrize(
    "content, said",
    [
        (
            archive(pickle.dumps(1), ("archive/data.pkl", pickle.dumps(2))),
            "two members of one name",
        ),
        (archive(pickle.dumps(1), ("archive/constants.pkl", pickle.dumps(2))), "TorchScript"),
        (archive(pickle.dumps(1), ("archive/code/__torch__.py", b"")), "TorchScript"),
        (
            archive(pickle.dumps(1), ("archive/more.pkl", pickle.dumps(Runs("true")))),
            "names posix.system",
        ),
        (archive(pickle.dumps(1))[:-30], "is damaged"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_are_not_what_torch_saves_are_refused(tmp_path, content, said):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(pickles.NotData, match=said):
        pickles.check_file(tmp_path / "x.pt")


def test_a_tar_archive_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps(Runs("true")))
    with tarfile.open(tmp_path / "x.pt", "w") as tar:
        tar.add(tmp_path / "x", "pickle")
    with pytest.raises(pickles.NotData, match="tar archive"):
        pickles.check_file(tmp_path / "x.pt")


def test_data_is_read():
    from argparse import Namespace
    from collections import OrderedDict
    from signal import SIGTERM

    value = {
        "args": Namespace(lr=1e-4, data=["a"], folder=Path("/x"), signal=SIGTERM),
        "set": {1},
        "bytes": b"\x80",
        "order": OrderedDict(a=1),
    }
    for protocol in (2, 4, 5):
        pickles.check(io.BytesIO(pickle.dumps(value, protocol)), "it")
        assert pickles.checked.loads(pickle.dumps(value, protocol)) == value


def put_object(path: Path, pickled: bytes) -> None:
    """Put an object that is no tensor into a checkpoint, as upstream keeps its arguments."""
    weight, common = "embedding.word_embeddings.weight", "common_state/shard_0_1"
    content = archive(pickled)
    stored = {
        Index(weight): Info("__0_0.distcp", 0, 700),
        Index(common): Info("__0_0.distcp", 700, len(content)),
    }
    (path / ".metadata").write_bytes(
        as_torch_pickles(Metadata({weight: Tensor(Size((1024, 100))), common: Object()}, stored))
    )
    with (path / "__0_0.distcp").open("ab") as file:
        file.write(content)


@pytest.mark.parametrize("place", ["planner_data", "an object", "common.pt", "mp_rank_00"])
@pytest.mark.parametrize("with_checksums", [False, True])
def test_a_checkpoint_with_code_in_it_is_refused_before_anything_opens_it(
    tmp_path, place, with_checksums
):
    ran = tmp_path / "ran"
    code = Runs(f"touch {ran}")
    write(tmp_path, 10)
    path = write(tmp_path, 20)
    match place:
        case "planner_data":
            (path / ".metadata").write_bytes(
                as_torch_pickles(Metadata({}, {}, planner_data=[code]))
            )
        case "an object":
            put_object(path, pickle.dumps([code], 2))
        case "common.pt":
            (path / "common.pt").write_bytes(archive(pickle.dumps({"args": code}, 2)))
        case "mp_rank_00":
            (path / "mp_rank_00").mkdir()
            (path / "mp_rank_00" / "model_optim_rng.pt").write_bytes(legacy(pickle.dumps(code, 2)))
    if with_checksums:
        checkpoints.settle(path)
    told = []
    assert checkpoints.newest_whole(tmp_path, told.append).step == 10
    assert "names posix.system, which is not data" in told[0] and not ran.exists()


READERS = """
import io, json, os, pickle, sys
from argparse import Namespace
from pathlib import Path

folder, names = Path(sys.argv[1]), json.loads(sys.argv[2])
os.environ |= {"HARNESS_DEVICE": "cpu", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
from harness.entry import rank
rank.prepare()
import numpy, torch
from megatron.core import safe_globals
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed import checkpoint

readers = {
    "torch.load": lambda name: torch.load(folder / f"{name}.zip.pt"),
    "torch.load of anything": lambda name: torch.load(folder / f"{name}.zip.pt", weights_only=False),
    "torch.load with pickle": lambda name: torch.load(folder / f"{name}.zip.pt", pickle_module=pickle, weights_only=False),
    "torch.load of an old file": lambda name: torch.load(folder / f"{name}.old.pt", weights_only=False),
    ".metadata": lambda name: FileSystemReader(folder / name).read_metadata(),
    "numpy.load": lambda name: numpy.load(folder / f"{name}.pkl", allow_pickle=True),
    "upstream's numpy.load": lambda name: safe_globals.safe_numpy_load(folder / f"{name}.pkl", allow_pickle=True),
    "upstream's unpickler": lambda name: safe_globals.SafeUnpickler((folder / f"{name}.pkl").open("rb")).load(),
    "upstream's common state": lambda name: load_common_state_dict(folder / name),
    "torch.jit.load": lambda name: torch.jit.load(folder / f"{name}.zip.pt"),
}
opened = []
for name in names:
    for reader, read in readers.items():
        try:
            read(name)
            opened.append([reader, name])
        except Exception as error:
            if isinstance(error, (ImportError, AttributeError)):
                opened.append([reader, name, repr(error)])

# what is data, and what upstream saves, is still read
torch.save({"weight": torch.ones(3), "n": 4, "moe": numpy.float64(2)}, folder / "good.pt")
good = torch.load(folder / "good.pt", weights_only=False)
assert good["n"] == 4 and good["weight"].sum() == 3 and good["moe"] == 2
torch.save({"weight": torch.ones(3)}, folder / "old.pt", _use_new_zipfile_serialization=False)
assert torch.load(folder / "old.pt", weights_only=False)["weight"].sum() == 3
numpy.save(folder / "objects.npy", numpy.array([{"a": 1}], dtype=object), allow_pickle=True)
assert numpy.load(folder / "objects.npy", allow_pickle=True)[0] == {"a": 1}
assert pickle.loads(pickle.dumps(torch.nn.Linear(2, 2))).bias.shape == (2,)  # messages between processes are not touched
checkpoint.save({"weight": torch.ones(3), "args": Namespace(lr=1e-4)}, checkpoint_id=folder / "saved", no_dist=True)
state = {"weight": torch.zeros(3), "args": None}
checkpoint.load(state, checkpoint_id=folder / "saved", no_dist=True)
assert state["weight"].sum() == 3 and state["args"].lr == 1e-4
tensor = pickle.dumps(torch.arange(3))
assert torch.equal(__import__("harness.run.pickles").run.pickles.checked.loads(tensor), torch.arange(3))
print(json.dumps(opened))
"""


@pytest.mark.cpu
def test_inside_a_rank_every_reader_refuses_code_whatever_was_checked_before(tmp_path):
    """The files come into being behind the front door's back: PyTorch's, NumPy's and upstream's readers open them."""
    ran = tmp_path / "ran"
    ways = {way: code for way, code in codes(f"touch {ran}").items() if way != "a second pickle"}
    names = []
    for number, code in enumerate(ways.values()):
        name = f"code{number}"
        names.append(name)
        (tmp_path / name).mkdir()
        for path, content in (
            (f"{name}.zip.pt", archive(code)),
            (f"{name}.old.pt", legacy(code)),
            (f"{name}.pkl", code),
            (f"{name}/.metadata", code),
            (f"{name}/common.pt", archive(code)),
            (
                f"{name}/metadata.json",
                b'{"sharded_backend": "torch_dist", "sharded_backend_version": 1}',
            ),
        ):
            (tmp_path / path).write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", READERS, str(tmp_path), json.dumps(names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr[-3000:]
    assert not ran.exists()
    assert json.loads(done.stdout.splitlines()[-1]) == []
