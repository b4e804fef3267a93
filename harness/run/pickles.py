"""Pickles in checkpoints: only data is read. A pickle can name any function, and reading calls it.

``check`` reads a file with stand-ins for every class, before anything else opens it, and needs no
torch. ``guard`` restricts PyTorch and upstream in this process to the names in pickles.yaml; it
holds for the bytes that are really opened, and for pickles inside pickles.

Both use Python's own unpickler to resolve names, so that no encoding hides a name from them:
neither operands from the memo nor the extension registry, which is empty. A pickle that cannot be
read completely is refused.
"""

from __future__ import annotations

import io
import pickle
import re
import sys
import types
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from harness.errors import UserError
from harness.system import yaml_files

TABLE = Path(__file__).with_name("pickles.yaml")
_TORCH_DATA = re.compile(
    r"[A-Z][A-Za-z0-9]*Storage|u?int\d+|b?float\d+(_\w+)?|complex\d+|bool|half|float|double|long"
)
_NUMPY_DTYPE = re.compile(r"[A-Z][A-Za-z0-9]*DType")
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
"""First pickle of a file of PyTorch before 1.6 (torch/serialization.py, MAGIC_NUMBER)."""


class NotData(UserError, pickle.UnpicklingError):
    """A pickle that names code, or that cannot be read completely."""


def is_data(module: str, name: str) -> bool:
    """Whether a pickle may use ``name`` of ``module``."""
    if name in _data().get(module, ()):
        return True
    pattern = {"torch": _TORCH_DATA, "numpy.dtypes": _NUMPY_DTYPE}.get(module)
    return bool(pattern and pattern.fullmatch(name))


def check_file(path: Path) -> None:
    """Refuse a file of ``torch.save``, or a bare pickle, that holds anything but data.

    Raises:
        NotData: it names code, is a TorchScript archive, or cannot be read.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        check(file, path.name)


def check(file: BinaryIO, where: str) -> None:
    """As ``check_file``, for an open file that ``where`` names in messages."""
    import tarfile  # imported here: listings do not need it

    start = file.tell()
    if file.read(4) == b"PK\x03\x04":
        file.seek(start)
        _check_archive(file, where)
        return
    file.seek(start)
    if tarfile.is_tarfile(file):
        raise NotData(f"{where} is a tar archive, as PyTorch wrote before 0.2: refused")
    file.seek(start)
    if stand_ins(file, where) == _TORCH_MAGIC:
        # four more pickles: protocol, system, objects, names of storages; then raw numbers
        for _ in range(4):
            stand_ins(file, where)
    elif file.read(1):
        raise NotData(f"{where} has bytes after its pickle: refused")


def stand_ins(file: BinaryIO, where: str) -> Any:
    """Read one pickle with stand-ins for every class: nothing is imported, nothing is called.

    Raises:
        NotData: it names anything but data, or it is damaged.
    """
    reader = _StandIns(file)
    try:
        return reader.load()
    except NotData as error:
        raise NotData(f"{where} {error}") from None
    except Exception as error:
        raise NotData(f"{where} is damaged ({type(error).__name__})") from None


def _check_archive(file: BinaryIO, where: str) -> None:
    import zipfile

    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            if len(set(names)) < len(names):
                raise NotData(f"{where} has two members of one name: refused")
            for name in names:
                base = name.rpartition("/")[2]
                if base == "constants.pkl" or "/code/" in name:
                    raise NotData(f"{where} is a TorchScript archive, which holds code: refused")
                if base.endswith((".pkl", ".pickle")):
                    stand_ins(io.BytesIO(archive.read(name)), where)
    except NotData:
        raise
    except Exception as error:
        raise NotData(f"{where} is damaged ({type(error).__name__})") from None


@cache
def _data() -> dict[str, frozenset[str]]:
    """Names that a pickle may use, by module."""
    return {
        module: frozenset(names.split())
        for modules, names in yaml_files.read(TABLE).items()
        for module in modules.split()
    }


class StandIn(dict):
    """Replaces any class or function in a pickle: keeps its arguments and state, does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = MappingProxyType({})

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args
        # a pickle inside a pickle: a tensor that was given to pickle.dumps
        if type(self).__name__ == "_load_from_bytes":
            check(io.BytesIO(args[0]), "a tensor in it")

    def __setstate__(self, state: Any) -> None:
        self.state = (
            state[0] if isinstance(state, tuple) and state and isinstance(state[0], dict) else state
        )

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def add(self, _: Any) -> None: ...

    __hash__ = object.__hash__


class _StandIns(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[StandIn]:
        _refuse_code(module, name)
        return type(name, (StandIn,), {})

    def persistent_load(self, _: Any) -> StandIn:
        return StandIn()


def _refuse_code(module: str, name: str) -> None:
    if not is_data(module, name):
        raise NotData(
            f"names {module}.{name}, which is not data: reading it could run code; refused"
        )


class _Unpickler(pickle.Unpickler):
    """Python's unpickler, restricted to data."""

    def find_class(self, module: str, name: str) -> Any:
        _refuse_code(module, name)
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _tensor_from_bytes
        return super().find_class(module, name)


def _tensor_from_bytes(pickled: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(pickled), weights_only=True)


def _load(file: BinaryIO, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def _loads(pickled: bytes, **options: Any) -> Any:
    return _Unpickler(io.BytesIO(pickled), **options).load()


checked = types.ModuleType("pickle")
"""Replaces the module ``pickle`` where files are read."""
checked.__dict__.update({**vars(pickle), "Unpickler": _Unpickler, "load": _load, "loads": _loads})


def guard() -> None:
    """Restrict PyTorch, NumPy, Transformer Engine and upstream to data in pickles, in this process.

    Messages between processes are not restricted. Call it again after Transformer Engine was
    imported.
    """
    import numpy.lib._format_impl
    import numpy.lib._npyio_impl
    import torch
    import torch.distributed.checkpoint.filesystem

    readers = [
        torch.distributed.checkpoint.filesystem,
        numpy.lib._format_impl,
        numpy.lib._npyio_impl,
    ]
    readers += [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformer_engine.")
    ]
    for module in readers:
        if getattr(module, "pickle", None) is pickle:
            module.pickle = checked
    if not getattr(torch.load, "reads_data_alone", False):
        torch.load = torch.serialization.load = _guarded(torch.load)
        torch.jit.load = _refuse_torchscript


def _guarded(load: Any) -> Any:
    def load_data(
        f: Any,
        map_location: Any = None,
        pickle_module: Any = None,
        *,
        weights_only: bool | None = None,
        **options: Any,
    ) -> Any:
        # explicit: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD changes only a missing argument
        if weights_only is None or weights_only:
            return load(f, map_location, weights_only=True, **options)
        return load(f, map_location, checked, weights_only=False, **options)

    load_data.reads_data_alone = True
    return load_data


def _refuse_torchscript(*_: Any, **__: Any) -> None:
    raise NotData("a TorchScript archive, which holds code: refused")
