"""The machine file: what ``make preflight`` measured on a machine, kept for predictions."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from harness.errors import UserError
from harness.experiment.hardware import Card, find_card
from harness.system.files import write_text

VERSION = 1
NAME = "machine.json"


class Rate(BaseModel):
    """A frozen measurement; an unknown or missing field is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HostRate(Rate):
    """Host time to launch an operation through PyTorch (harness/entry/launch_rate.py)."""

    add_us: float
    operation_us: float


class ProductRate(Rate):
    """A bf16 product of a linear layer, [rows, inner] x [inner, columns]."""

    direction: Literal["forward", "input_gradient", "weight_gradient"]
    rows: int
    columns: int
    inner: int
    us: float

    @property
    def tflops(self) -> float:
        return 2 * self.rows * self.columns * self.inner / self.us / 1e6


class LinearRate(Rate):
    """Transformer Engine's linear layer with its conversion to fp8; recipe None: bf16."""

    recipe: str | None
    rows: int
    columns: int
    inner: int
    forward_us: float
    backward_us: float

    @property
    def tflops(self) -> float:
        """Of the three products of both passes."""
        flops = 6 * self.rows * self.columns * self.inner
        return flops / (self.forward_us + self.backward_us) / 1e6


class GroupedRate(Rate):
    """A layer of experts: ``rows`` of each expert, [rows, inner] x [inner, columns]."""

    experts: int
    rows: int
    columns: int
    inner: int
    forward_us: float
    backward_us: float
    forward_launch_us: float
    backward_launch_us: float

    @property
    def launched_in(self) -> float:
        """The host's time to launch it, relative to the GPU's to compute it."""
        launch_us = self.forward_launch_us + self.backward_launch_us
        return launch_us / (self.forward_us + self.backward_us)

    @property
    def tflops(self) -> float:
        """Of the three products of both passes."""
        flops = 6 * self.experts * self.rows * self.columns * self.inner
        return flops / (self.forward_us + self.backward_us) / 1e6


class AttentionRate(Rate):
    """Causal attention of one layer."""

    head_size: int
    heads: int
    key_heads: int
    length: int
    sequences: int
    dropout: float
    forward_us: float
    backward_us: float

    @property
    def scores(self) -> float:
        """Scores that the causal mask leaves."""
        return self.sequences * self.heads * self.length**2 / 2

    @property
    def tflops(self) -> float:
        """Of two products forward and five backward, as flash attention computes them
        (Dao 2023, arXiv:2307.08691)."""
        flops = 7 * 2 * self.head_size * self.scores
        return flops / (self.forward_us + self.backward_us) / 1e6


class MemoryRates(Rate):
    """Memory bandwidth, reads and writes together."""

    copy_gb_per_s: float
    add_gb_per_s: float
    norm_gb_per_s: float
    gelu_gb_per_s: float


class CollectiveRate(Rate):
    """A collective over all ranks of the node; ``size`` in bytes, see ``links.SIZES``."""

    name: str
    ranks: int
    size: int
    us: float
    launch_us: float


class NetworkRate(CollectiveRate):
    """A collective over one rank of each node, ``stride`` apart; all such groups at once."""

    stride: int


class StorageRates(Rate):
    """Host, GPU and disk."""

    to_device_gb_per_s: float
    to_host_gb_per_s: float
    disk_write_gb_per_s: float


class LayerRate(Rate):
    """Host time of a layer of this kind at size 1, where launching bounds it.

    ``rest_…`` is what a model has besides its layers: embedding, output layer, loss.
    """

    kind: str
    ranks: int
    forward_ms: float
    backward_ms: float
    rest_forward_ms: float
    rest_backward_ms: float
    optimizer_ms: float
    """A layer's share of the optimizer's step."""
    rest_optimizer_ms: float


class GpuRates(Rate):
    """One GPU; on a CPU, one process."""

    index: int
    uuid: str | None
    first_tflops: float
    sustained_tflops: float
    copy_gb_per_s: float
    to_device_gb_per_s: float
    pairs_gb_per_s: dict[int, float]
    sm_clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None


class Machine(Rate):
    """One node, as it was measured; rates of the GPUs are medians over them."""

    version: Literal[1] = VERSION
    device: Literal["cpu", "cuda"]
    quick: bool
    gpu: str | None
    cpu: str
    cores: int
    host: str
    software: dict[str, str | None]
    measured: str
    """Day and time in UTC, ISO 8601."""
    seconds: float
    """What the measurement took."""
    launch: HostRate
    gpus: tuple[GpuRates, ...]
    memory: MemoryRates
    storage: StorageRates
    products: tuple[ProductRate, ...]
    linears: tuple[LinearRate, ...] = ()
    grouped: tuple[GroupedRate, ...] = ()
    attention: tuple[AttentionRate, ...] = ()
    collectives: tuple[CollectiveRate, ...] = ()
    layers: tuple[LayerRate, ...] = ()
    between_nodes: tuple[NetworkRate, ...] = ()
    """Where several nodes were measured together."""
    nodes_gb_per_s: dict[int, float] = {}
    """What a rank exchanges with its peer in each other node, each way; by the node's rank."""
    failures: tuple[str, ...] = ()
    """Measurements that failed, with the reason."""


def read(path: Path) -> Machine:
    """The machine file at ``path``.

    Raises:
        UserError: it is missing, incomplete or of another version.
    """
    try:
        return Machine.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}\nmake preflight measures this machine") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path} is no complete machine file: {where}: {first['msg']}\n"
            "make preflight measures this machine anew"
        ) from None


def foreign(machine: Machine, card: Card, uuids: Collection[str]) -> str:
    """Why ``machine`` says nothing about these cards of this machine; empty where it does.

    Args:
        uuids: of this machine's GPUs. Where it has none, as a login node, the file of a node may
            well be wanted.
    """
    if machine.device != "cuda":
        return "was measured on a CPU"
    if find_card(machine.gpu or "") != card:
        return f"was measured on {machine.gpu}"
    if uuids and not {*uuids} & {gpu.uuid for gpu in machine.gpus}:
        return f"was measured on another machine ({machine.host}, {machine.measured[:10]})"
    return ""


def write(path: Path, machine: Machine) -> None:
    """Write the file at once: an interrupted write leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, machine.model_dump_json(indent=1) + "\n")
