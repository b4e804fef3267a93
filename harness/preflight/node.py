"""Measure this node: a rank on each GPU, their findings together, and what stands out."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.launching.rendezvous.connections import host_and_port
from harness.machine import gpus
from harness.machine.provenance import describe_environment
from harness.predict.machine_file import GpuRates, Machine
from harness.system.orphans import end_with

CPU_RANKS = 2
LIMIT_S = 150
MODULE = "harness.preflight"
NEEDED = ("launch", "memory", "storage", "rates", "products")
SOFTWARE = ("torch", "megatron-core", "transformer-engine", "nccl", "driver", "cuda_of_driver")
SHARED = ("products", "linears", "grouped", "attention", "collectives", "layers")
"""Lists of measurements; the machine file has their medians over the ranks."""
TIMES = ("us", "ms")
"""Last words of the names of times."""
TORCHRUN = re.compile(r"[EW]\d{4} .*torch/distributed/elastic")
"""Begins what torchrun says after a rank has failed."""


def measure(device: str, gpu_ids: Sequence[int], quick: bool, outdir: Path) -> Machine:
    """Start a rank on each of these GPUs, or two on a CPU, and put together what they measured.

    Raises:
        UserError: a rank failed or hung before the parts that every machine file has.
    """
    begun = time.monotonic()
    outdir.mkdir(parents=True, exist_ok=True)
    ranks = len(gpu_ids) if device == "cuda" else CPU_RANKS
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=outdir) as folder:
        ended = run_ranks(device, gpu_ids, ranks, quick, Path(folder))
        found = [_left(Path(folder) / f"{rank}.json") for rank in range(ranks)]
        log = _tail(Path(folder) / "log")
    missing = [key for key in NEEDED if not all(key in one for one in found)]
    if missing:
        doing = " and ".join(dict.fromkeys(one["doing"] or "the end" for one in found))
        raise UserError(f"preflight {ended} before {missing[0]} was measured, at: {doing}\n{log}")
    if ended:
        print(log, file=sys.stderr)
        for rank, one in enumerate(found):
            if one["doing"]:
                one["failures"].append(f"{one['doing']}: rank {rank} {ended}")
    return _machine(device, gpu_ids, quick, found, time.monotonic() - begun)


@dataclass(frozen=True)
class Place:
    """This node among others that are measured together."""

    nodes: int
    node_rank: int
    rendezvous: str


def measure_between(
    machine: Machine, gpu_ids: Sequence[int], place: Place, outdir: Path
) -> Machine:
    """``machine`` with what its ranks exchange with those of the other nodes.

    Raises:
        UserError: a node did not come, or a rank failed.
    """
    begun, ranks = time.monotonic(), len(machine.gpus)
    host, port = host_and_port(place.rendezvous)
    with tempfile.TemporaryDirectory(prefix=".preflight-", dir=outdir) as name:
        folder = Path(name)
        words = [
            *(f"--nnodes={place.nodes}", f"--node-rank={place.node_rank}"),
            # a dynamic rendezvous would number the nodes in the order in which they come
            *(f"--master-addr={host}", f"--master-port={port}"),
            *(f"--nproc-per-node={ranks}", "-m", f"{MODULE}.between_nodes"),
            *(machine.device, str(folder)),
        ]
        ended = _run(words, machine.device, gpu_ids, folder)
        if ended:
            raise UserError(
                f"the measurement of {place.nodes} nodes {ended}; each needs the same command with"
                f" its own NODE_RANK\n{_tail(folder / 'log')}"
            )
        found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    nodes = {
        int(node): statistics.median(one["nodes_gb_per_s"][node] for one in found)
        for node in found[0]["nodes_gb_per_s"]
    }
    changes = {
        "between_nodes": medians([one["between_nodes"] for one in found]),
        "nodes_gb_per_s": nodes,
        "seconds": round(machine.seconds + time.monotonic() - begun, 1),
    }
    return Machine.model_validate(machine.model_dump() | changes)


def run_ranks(device: str, gpu_ids: Sequence[int], ranks: int, quick: bool, folder: Path) -> str:
    """Run them to their end; what went wrong, empty if nothing did."""
    words = [
        "--standalone",
        *(f"--nproc-per-node={ranks}", "-m", MODULE),
        *(device, str(int(quick)), str(folder)),
    ]
    return _run(words, device, gpu_ids, folder)


def _run(words: Sequence[str], device: str, gpu_ids: Sequence[int], folder: Path) -> str:
    environment = os.environ | {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
        # processes that compile would take longer to start than these few kernels
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpu_ids))
    else:
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    log = folder / "log"
    launcher = os.getpid()
    # as Ctrl-C: what was measured is kept
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            preexec_fn=lambda: end_with(launcher, signal.SIGTERM),
        )
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"did not end in {LIMIT_S} s"
        except KeyboardInterrupt:
            return "was interrupted"
        finally:
            signal.signal(signal.SIGTERM, before)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    return f"failed with status {status}" if status else ""


def _left(path: Path) -> dict[str, Any]:
    """What a rank has measured so far."""
    try:
        return json.loads(path.read_text())
    except OSError:
        return {"failures": [], "doing": "its start"}


def _tail(log: Path) -> str:
    """The last lines that ranks wrote."""
    lines = log.read_text(errors="replace").splitlines()
    ours = list(itertools.takewhile(lambda line: not TORCHRUN.match(line), lines))
    return "\n".join(line for line in ours[-20:] if line.strip())


def _machine(
    device: str,
    gpu_ids: Sequence[int],
    quick: bool,
    found: Sequence[Mapping[str, Any]],
    seconds: float,
) -> Machine:
    environment = describe_environment(device, gpu_ids)
    local = {gpu.index: gpu for gpu in gpus.list_gpus()}
    rates = []
    for rank, one in enumerate(found):
        first, last = one["rates"]
        now = one["gpu"] or {"index": rank}
        gpu = local.get(now["index"]) if device == "cuda" else None
        rates.append(
            GpuRates(
                **now,
                uuid=gpu and gpu.uuid,
                first_tflops=first,
                sustained_tflops=last,
                copy_gb_per_s=one["memory"]["copy_gb_per_s"],
                to_device_gb_per_s=one["storage"]["to_device_gb_per_s"],
                pairs_gb_per_s=one.get("pairs", {}),
            )
        )
    return Machine(
        device=device,
        quick=quick,
        gpu=environment["gpu"],
        cpu=environment["cpu"],
        cores=environment["cores"],
        host=environment["host"],
        software={name: environment[name] for name in SOFTWARE},
        measured=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        gpus=tuple(rates),
        failures=tuple(dict.fromkeys(line for one in found for line in one["failures"])),
        **{name: _median([one[name] for one in found]) for name in ("launch", "memory", "storage")},
        **{name: medians([one.get(name, []) for one in found]) for name in SHARED},
    )


def _median(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.median(one[key] for one in each) for key in each[0]}


def medians(each: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What the ranks measured, each with the medians of its times over those that measured it."""
    same = defaultdict(list)
    for one in itertools.chain.from_iterable(each):
        same[_key(one)].append(one)
    return [
        dict(key)
        | {
            name: statistics.median(one[name] for one in measured)
            for name in measured[0]
            if _is_time(name)
        }
        for key, measured in same.items()
    ]


def _key(one: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in one.items() if not _is_time(name))


def _is_time(name: str) -> bool:
    return name.split("_")[-1] in TIMES
