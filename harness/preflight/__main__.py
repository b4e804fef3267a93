"""One rank of ``make preflight``: measures its GPU, and with the others the links.

``python -m harness.preflight DEVICE QUICK FOLDER``, started by torchrun.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel

from harness.system.files import write_json

BATCH_S, QUICK_BATCH_S = 0.01, 0.003
SUSTAINED_S, QUICK_SUSTAINED_S = 5.0, 0.5
PART_S = 45
"""A part that takes longer hangs: it says where, and the measurement ends."""
SQUARE = {"cuda": 8192, "cpu": 256}


def main(device: str, quick: bool, folder: Path) -> None:
    """Measure part by part, and keep what is known in ``FOLDER/<rank>.json`` after each.

    So a part that hangs costs no other: the file says which one it is.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device == "cpu":
        from harness.cpu import install

        install()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
        dist.init_process_group("gloo")
    else:
        torch.cuda.set_device(rank)
        # Without device_id: with it every group of initialize_model_parallel connects at once.
        dist.init_process_group("nccl")
    begun = time.monotonic()
    found: dict[str, Any] = {"failures": []}
    for name, rates in parts(device, quick, folder, rank, ranks):
        if rank == 0:
            print(f"{time.monotonic() - begun:5.1f} s  {name}", flush=True)
        write_json(folder / f"{rank}.json", found | {"doing": name})
        faulthandler.dump_traceback_later(PART_S, exit=True)
        try:
            found |= rates()
        except Exception as error:  # whatever other libraries raise, the other parts go on
            found["failures"].append(f"{name}: {_said(error)}")
        if device == "cuda":
            torch.cuda.empty_cache()
    faulthandler.cancel_dump_traceback_later()
    write_json(folder / f"{rank}.json", found | {"doing": None})
    dist.barrier()
    dist.destroy_process_group()


def parts(device: str, quick: bool, folder: Path, rank: int, ranks: int) -> Iterator[Part]:
    """The parts of the measurement, the surest first."""
    from harness.entry import launch_rate
    from harness.preflight import kernels, layers, links, shapes
    from harness.preflight.clock import Clock

    clock = Clock(device, QUICK_BATCH_S if quick else BATCH_S)
    gpu, full = device == "cuda", not quick
    size, seconds = SQUARE[device], SUSTAINED_S if full else QUICK_SUSTAINED_S
    cases = shapes.ATTENTION if gpu else shapes.SMALL_ATTENTION
    yield "launches", lambda: {"launch": launch_rate.measure(device).model_dump()}
    yield "memory", lambda: {"memory": kernels.memory(clock, device).model_dump()}
    yield "copies", lambda: {"storage": links.storage(folder, device, clock).model_dump()}

    def sustained() -> dict[str, Any]:
        """Meanwhile the host, which has nothing to do, imports what later parts need."""
        loading = threading.Thread(target=layers.load if gpu and full else lambda: None)
        rates = kernels.sustained_tflops(seconds, size, device, clock, loading.start)
        sample = _sample(rank) if gpu else {}
        loading.join()
        return {"rates": rates, "gpu": sample}

    yield "sustained product", sustained
    if ranks > 1:
        sizes = links.SIZES if gpu and full else links.SMALL_SIZES
        yield (
            "links",
            lambda: {
                "collectives": _listed(links.collectives(clock, sizes, device)),
                "pairs": links.pairs_gb_per_s(clock, device),
            },
        )

    def mine(cases: Sequence[Any]) -> Sequence[Any]:
        """Ranks share the cases: each is measured on one GPU."""
        return cases[rank::ranks]

    picked = mine(shapes.chosen_products(device, quick))
    yield "products", lambda: {"products": _listed(kernels.products(clock, picked, device))}
    if quick:
        return
    yield "attention", lambda: {"attention": _listed(kernels.attention(clock, mine(cases), device))}
    measured: list[dict[str, Any]] = []
    for kind in layers.kinds(device, ranks):

        def layer(kind=kind) -> dict[str, Any]:
            measured.append(layers.measure(kind, clock, device, ranks).model_dump())
            return {"layers": measured}

        yield f"layer: {kind}", layer
    if not gpu:
        return
    experts = mine(shapes.GROUPED)
    yield "experts' products", lambda: {"grouped": _listed(kernels.grouped(clock, experts))}
    linears: list[dict[str, Any]] = []
    for recipe in (None, "delayed", "tensorwise", "blockwise"):

        def linear(recipe=recipe) -> dict[str, Any]:
            linears.extend(_listed(kernels.linears(clock, mine(shapes.FP8_PRODUCTS), recipe)))
            return {"linears": linears}

        yield f"linear layers, {recipe or 'bf16'}", linear


Part = tuple[str, Callable[[], dict[str, Any]]]


def _listed(rates: Iterable[BaseModel]) -> list[dict[str, Any]]:
    return [rate.model_dump() for rate in rates]


def _said(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _sample(rank: int) -> dict[str, Any]:
    """Clock, power and temperature right after the sustained product."""
    from harness.machine import gpus

    index = int(os.environ["CUDA_VISIBLE_DEVICES"].split(",")[rank])
    now = gpus.sample([index])[0]
    return {
        "index": index,
        "sm_clock_mhz": now.sm_clock_mhz,
        "power_w": now.power_w,
        "temperature_c": now.temperature_c,
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "1", Path(sys.argv[3]))
