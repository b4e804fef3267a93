"""How fast a machine does each kind of work: what ``make preflight`` measured.

Rates of a card come from its machine files in experiments/machines, one folder a card; those of a
card without any are another card's, scaled by the fastest products measured on both or by the data
sheets; what others measured and published of it (experiments/rates.yaml) comes before.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path

from pydantic import BaseModel

from harness.errors import UserError
from harness.experiment.catalog import EXPERIMENTS
from harness.experiment.hardware import Card, required_card
from harness.experiment.model import Positive
from harness.predict import machine_file
from harness.predict.machine_file import Machine
from harness.predict.operations import NVFP4_BYTES
from harness.system import yaml_files

FOLDER = EXPERIMENTS / "machines"
PUBLISHED = EXPERIMENTS / "rates.yaml"
QUANTISED_BYTES = {
    "delayed": 4,
    "tensorwise": 6,
    "blockwise": 4,
    "mxfp8": 4,
    "nvfp4": 4 + 2 * NVFP4_BYTES,
}
"""Moved per element that is quantised: read in bf16, written by rows and by columns; tensorwise and
in nvfp4, read once more for the largest value (Float8CurrentScalingQuantizer and NVFP4Quantizer in
transformer_engine/pytorch/tensor)."""
GPU_BOUND = 1.2
"""A grouped product that takes so many times as long as its launch says how fast the GPU is."""
LEAST_GROUPED_SHARE = 0.3
"""Of products much smaller than those measured; a rough value."""
ATTENTION_HEAD, ATTENTION_LENGTH = 128, 4096
"""Of published attention."""
LARGE_BYTES = 2**26
"""Smaller messages say more about latency than about bandwidth."""
PLAIN_LAYERS = ("dense", "no dropout", "gated")
"""Kinds of layers that differ by less than the noise of the host."""


SAME_LAUNCH_RATE = 1.2
"""Two launch rates whose ratio is smaller are those of hosts that are alike."""


def launch_rates_apart(here_us: float | None, there_us: float | None) -> float:
    """How far two hosts' times of an operation are apart: the logarithm of their ratio, unsigned.

    Infinite where only one is known.
    """
    if here_us and there_us:
        return abs(math.log(here_us / there_us))
    return 0.0 if here_us is there_us else math.inf


def launch_alike(here_us: float | None, there_us: float | None) -> bool:
    """Whether launch-bound steps take about as long on both hosts."""
    return launch_rates_apart(here_us, there_us) < math.log(SAME_LAUNCH_RATE)


@dataclass(frozen=True)
class Launches:
    """Host time of a layer in ms."""

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0

    def __sub__(self, other: Launches) -> Launches:
        """What this layer has beyond another; never negative, though noise may be."""
        return Launches(
            max(0.0, self.forward - other.forward),
            max(0.0, self.backward - other.backward),
            max(0.0, self.optimizer - other.optimizer),
        )

    def __add__(self, other: Launches) -> Launches:
        return Launches(
            self.forward + other.forward,
            self.backward + other.backward,
            self.optimizer + other.optimizer,
        )

    def __mul__(self, times: float) -> Launches:
        return Launches(times * self.forward, times * self.backward, times * self.optimizer)


@dataclass(frozen=True)
class Scores:
    """Time of one attention score in ps, both products included."""

    head_size: int
    length: int
    dropout: bool
    forward_ps: float
    backward_ps: float


@dataclass(frozen=True)
class Rates:
    """The rates of one GPU, of its links, and of the host that launches its work."""

    product_tflops: float
    fp8_tflops: Mapping[str, float]
    """By recipe, without the conversion to fp8."""
    memory_gb_s: float
    """Of what lies between the products: mean of copy, add, norm and activation."""
    scores: Sequence[Scores]
    link_gb_s: float
    """What each of two ranks of a node sends to the other in a second, both at the same time."""
    operation_us: float
    layers: Mapping[str, Launches]
    """By kind (harness/preflight/layers.py)."""
    network_gb_s: float | None = None
    """What a rank sends in a second to its peer in another node; None: by the data sheet."""
    grouped_tflops: float | None = None
    """Of experts' grouped products, where others published it."""
    fp4_tflops: float | None = None
    """In NVFP4, without the conversion to it; None where the card has none."""
    grouped_shares: Sequence[tuple[float, float]] = ()
    """Operations of an expert's product -> speed of grouped ones, relative to ``product_tflops``.
    """

    def attention_ps(self, head_size: int, length: int, dropout: bool) -> tuple[float, float]:
        """Forward and backward time of a score in ps.

        Interpolated between the measured lengths in 1 / length, since tiles on the diagonal are
        half empty, and between head sizes linearly.
        """
        ours = [score for score in self.scores if score.dropout == dropout]
        sizes = sorted({score.head_size for score in ours})
        by_size = []
        for size in sizes:
            points = {score.length: score for score in ours if score.head_size == size}
            by_size.append(_at_length(length, points))
        if len(sizes) == 1:
            return by_size[0]
        below, above = sizes[0], sizes[-1]
        share = (head_size - below) / (above - below)
        first, last = by_size[0], by_size[-1]
        return (
            first[0] + share * (last[0] - first[0]),
            first[1] + share * (last[1] - first[1]),
        )

    def grouped_flop_per_s(self, flops: float) -> float:
        """Speed of experts' grouped products in bf16.

        Interpolated over the logarithm of ``flops``, the operations of one expert's product.
        """
        if self.grouped_tflops:
            return self.grouped_tflops * 1e12
        logarithms = [math.log(size) for size, _ in self.grouped_shares]
        pairs = list(itertools.pairwise(range(len(logarithms))))
        place = math.log(flops)
        low, high = next((pair for pair in pairs if place <= logarithms[pair[1]]), pairs[-1])
        along = (place - logarithms[low]) / (logarithms[high] - logarithms[low])
        (_, below), (_, above) = self.grouped_shares[low], self.grouped_shares[high]
        share = min(1.0, max(LEAST_GROUPED_SHARE, below + along * (above - below)))
        return share * self.product_tflops * 1e12

    @cached_property
    def plain(self) -> Launches:
        """A layer without anything of what ``more`` names."""
        known = [self.layers[kind] for kind in PLAIN_LAYERS if kind in self.layers]
        return sum(known, Launches()) * (1 / len(known))

    def more(self, kind: str) -> Launches:
        """What a layer of this kind launches beyond a plain one."""
        return self.layers[kind] - self.plain

    def experts(self, number: float) -> Launches:
        """What a layer with so many experts on a rank launches beyond a plain one."""
        few, many = self.more("8 experts"), self.more("64 experts")
        return few + (many - few) * ((number - 8) / (64 - 8))

    def with_published(self, published: Published) -> Rates:
        """These rates, with those that others measured instead."""
        changed: dict[str, object] = {"product_tflops": published.product_tflops}
        changed["grouped_tflops"] = published.grouped_tflops
        if attention := published.attention_tflops:
            usual = self.attention_ps(ATTENTION_HEAD, ATTENTION_LENGTH, False)
            forward, backward = (
                flops * ATTENTION_HEAD / tflops / ps
                for flops, tflops, ps in zip(
                    (4, 10), (attention.forward, attention.backward), usual, strict=True
                )
            )
            changed["scores"] = [
                replace(
                    score,
                    forward_ps=score.forward_ps * forward,
                    backward_ps=score.backward_ps * backward,
                )
                for score in self.scores
            ]
        return replace(self, **changed)

    def with_fp4(self, card: Card) -> Rates:
        """These rates of ``card``, with that of NVFP4, which no machine file has.

        Taken to reach the share of its peak that fp8, scaled by tensors, reaches of its own; peaks
        are those of the data sheet.
        """
        fp8 = self.fp8_tflops.get("tensorwise")
        if card.fp4_tflops is None or card.fp8_tflops is None or fp8 is None:
            return self
        return replace(self, fp4_tflops=fp8 * card.fp4_tflops / card.fp8_tflops)

    def scaled(self, measured: Card, card: Card) -> Rates:
        """These rates of ``measured``, on ``card``, by the data sheets of both."""
        if card == measured:
            return self
        arithmetic, fp8 = _arithmetic(measured, card)
        link = card.link_gb_per_s / measured.link_gb_per_s
        return replace(
            self,
            product_tflops=self.product_tflops * arithmetic,
            fp8_tflops={recipe: rate * fp8 for recipe, rate in self.fp8_tflops.items()},
            link_gb_s=self.link_gb_s * link,
            grouped_tflops=self.grouped_tflops and self.grouped_tflops * arithmetic,
            memory_gb_s=self.memory_gb_s * card.memory_gb_per_s / measured.memory_gb_per_s,
            scores=[
                replace(
                    score,
                    forward_ps=score.forward_ps / arithmetic,
                    backward_ps=score.backward_ps / arithmetic,
                )
                for score in self.scores
            ],
        )


def _arithmetic(measured: Card, card: Card) -> tuple[float, float]:
    """How much faster the products of ``card`` are than those of ``measured``, in bf16 and fp8.

    By the fastest that was achieved on both (hardware.ACHIEVED), else by the data sheets.
    """
    sheet = card.bf16_tflops / measured.bf16_tflops
    if not (measured.achieved_tflops and card.achieved_tflops):
        return sheet, sheet
    (before, before_fp8), (after, after_fp8) = measured.achieved_tflops, card.achieved_tflops
    bf16 = after / before
    return bf16, after_fp8 / before_fp8 if before_fp8 and after_fp8 else bf16


def _at_length(length: int, points: Mapping[int, Scores]) -> tuple[float, float]:
    """Forward and backward time of a score, on the line through the two nearest lengths."""
    lengths = sorted(points)
    if len(lengths) == 1:
        only = points[lengths[0]]
        return only.forward_ps, only.backward_ps
    pairs = list(itertools.pairwise(lengths))
    below, above = next((pair for pair in pairs if length <= pair[1]), pairs[-1])
    share = (1 / length - 1 / below) / (1 / above - 1 / below)
    first, last = points[below], points[above]
    return (
        first.forward_ps + share * (last.forward_ps - first.forward_ps),
        first.backward_ps + share * (last.backward_ps - first.backward_ps),
    )


class Attention(BaseModel, frozen=True, extra="forbid"):
    """TFLOP/s of causal attention's scores: two products forward, five backward."""

    forward: Positive
    backward: Positive


class Published(BaseModel, frozen=True, extra="forbid"):
    """What others measured on a card and published."""

    source: str
    product_tflops: Positive
    grouped_tflops: Positive | None = None
    attention_tflops: Attention | None = None


class Like(BaseModel, frozen=True, extra="forbid"):
    """The card whose rates another's are scaled from."""

    like: str


@cache
def published(path: Path = PUBLISHED) -> Mapping[str, Published | Like]:
    """By card: its published rates, or the card that it is like.

    Raises UserError if the file is not valid.
    """
    found: dict[str, Published | Like] = {}
    for key, fields in (entries := yaml_files.read(path)).items():
        where = f"{path.name}: {key}"
        with yaml_files.entry(path, entries, key):
            required_card(str(key), f"{where}: card")
            kind = Like if "like" in yaml_files.mapping(fields, where) else Published
            found[key] = yaml_files.build(kind, fields, where)
            if isinstance(found[key], Like):
                required_card(found[key].like, f"{where}: like")
    return found


@cache
def of_card_like(measured_on: Card, card: Card) -> Rates:
    """The rates in the machine files of ``measured_on``, scaled to ``card`` if it is another.

    Of a card whose rates are published, those. Raises UserError as ``of_card``.
    """
    usual, known = of_card(measured_on.key), published().get(card.key)
    if isinstance(known, Like):
        near = required_card(known.like, card.key)
        return of_card_like(measured_on, near).scaled(near, card)
    rates = usual.scaled(measured_on, card)
    return rates.with_published(known) if known else rates


@cache
def of_card(name: str) -> Rates:
    """The rates in the machine files of the card with this short name.

    Raises:
        UserError: it has none, or one is damaged.
    """
    files = sorted((FOLDER / name).glob("*.json"))
    if not files:
        raise UserError(
            f"no machine file of {required_card(name, name).name} in experiments/machines/{name}; "
            "make preflight writes one"
        )
    return measured([machine_file.read(path) for path in files])


def measured(files: Sequence[Machine]) -> Rates:
    """What machine files of the same kind of machine say: medians, and means of host times.

    The rates of links are those of the all-reduce of the largest message, as NVIDIA's nccl-tests
    count it (doc/PERFORMANCE.md): 2 (n-1)/n of the message.
    """
    products = [rate.tflops for file in files for rate in file.products]
    memory_gb_s = statistics.mean(
        rate for file in files for rate in file.memory.model_dump().values()
    )
    return Rates(
        product_tflops=statistics.median(products),
        fp8_tflops=_fp8_tflops(files, memory_gb_s),
        memory_gb_s=memory_gb_s,
        scores=_scores(files),
        link_gb_s=_link_gb_s(files),
        operation_us=statistics.mean(file.launch.operation_us for file in files),
        layers=_layers(files),
        grouped_shares=_grouped_shares(files, statistics.median(products)),
    )


def with_file(usual: Rates, file: Machine) -> Rates:
    """``usual`` with what one machine file says instead.

    A quick one has no attention and no layers. Its layers are kept as on the usual host: whoever
    predicts scales them by the launch rate.
    """
    memory_gb_s = statistics.mean(file.memory.model_dump().values())
    layers = {
        kind: launches * (usual.operation_us / file.launch.operation_us)
        for kind, launches in _layers([file]).items()
    }
    product_tflops = statistics.median(rate.tflops for rate in file.products)
    return replace(
        usual,
        product_tflops=product_tflops,
        fp8_tflops={**usual.fp8_tflops, **_fp8_tflops([file], memory_gb_s)},
        memory_gb_s=memory_gb_s,
        scores=_scores([file]) or usual.scores,
        link_gb_s=_link_gb_s([file]) or usual.link_gb_s,
        network_gb_s=_network_gb_s(file) or usual.network_gb_s,
        layers={**usual.layers, **layers},
        grouped_shares=_grouped_shares([file], product_tflops) or usual.grouped_shares,
    )


def _fp8_tflops(files: Sequence[Machine], memory_gb_s: float) -> dict[str, float]:
    """The fastest layer of each recipe, without its conversions: small ones are launch-bound."""
    found: dict[str, float] = {}
    for rate in (rate for file in files for rate in file.linears if rate.recipe):
        elements = rate.rows * (rate.inner + rate.columns)
        converted_us = QUANTISED_BYTES[rate.recipe] * elements / memory_gb_s / 1e3
        products_us = rate.forward_us + rate.backward_us - converted_us
        tflops = 6 * rate.rows * rate.columns * rate.inner / products_us / 1e6
        found[rate.recipe] = max(found.get(rate.recipe, 0.0), tflops)
    return found


def _scores(files: Sequence[Machine]) -> list[Scores]:
    rates = [rate for file in files for rate in file.attention]
    return [
        Scores(
            *key,
            forward_ps=statistics.median(rate.forward_us * 1e6 / rate.scores for rate in same),
            backward_ps=statistics.median(rate.backward_us * 1e6 / rate.scores for rate in same),
        )
        for key, same in _grouped(
            rates, lambda rate: (rate.head_size, rate.length, rate.dropout > 0)
        ).items()
    ]


def _link_gb_s(files: Sequence[Machine]) -> float | None:
    """None where no file has two GPUs or more, or large messages."""
    rates = [rate for file in files for rate in file.collectives if rate.name == "all_reduce"]
    largest = max((rate.size for rate in rates), default=0)
    if largest < LARGE_BYTES:
        return None
    return statistics.median(
        2 * (rate.ranks - 1) / rate.ranks * rate.size / rate.us / 1e3
        for rate in rates
        if rate.size == largest
    )


def _network_gb_s(file: Machine) -> float | None:
    """None where no other node was measured, or not with large messages."""
    gathers = [rate for rate in file.between_nodes if rate.name == "all_gather"]
    largest = max(gathers, key=lambda rate: rate.size, default=None)
    if largest is None or largest.size < LARGE_BYTES:
        return None
    return (largest.ranks - 1) / largest.ranks * largest.size / largest.us / 1e3


def _grouped_shares(files: Sequence[Machine], product_tflops: float) -> list[tuple[float, float]]:
    """By the operations of an expert's product, in order: medians."""
    rates = [rate for file in files for rate in file.grouped if rate.launched_in < 1 / GPU_BOUND]
    sizes = _grouped(rates, lambda rate: 2.0 * rate.rows * rate.columns * rate.inner)
    return [
        (size, statistics.median(rate.tflops for rate in same) / product_tflops)
        for size, same in sorted(sizes.items())
    ]


def _layers(files: Sequence[Machine]) -> dict[str, Launches]:
    """Means: a host's noise is more than what any one file says of a kind.

    Each file counts with the launch rate of its own moment.
    """
    usual = statistics.mean(file.launch.operation_us for file in files)
    rates = [
        (
            rate.kind,
            Launches(rate.forward_ms, rate.backward_ms, rate.optimizer_ms)
            * (usual / file.launch.operation_us),
        )
        for file in files
        for rate in file.layers
    ]
    return {
        kind: sum((launches for _, launches in same), Launches()) * (1 / len(same))
        for kind, same in _grouped(rates, lambda rate: rate[0]).items()
    }


def _grouped[Item, Key](items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found
