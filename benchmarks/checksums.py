"""The cost of a checkpoint's checksums: upstream's way (one file after another) beside the
harness's (several at once).

    .venv/bin/python benchmarks/checksums.py FOLDER [FILES] [MIB_EACH]

Writes FILES files (8) of MIB_EACH (128) random MiB into FOLDER, which is emptied afterwards, and
times, median of 5: upstream's ``save_integrity_manifest``, for which training waits;
``checkpoints.settle``, which syncs and hashes in the background; and the comparison before a load.
The files lie in the page cache, as just after a save.
"""

import json
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from harness.machine import upstream
from harness.run import checkpoints, checksums

TIMES = 5


def measure(do: Callable[[], object]) -> dict[str, float]:
    """Medians of ``TIMES`` runs: seconds, and seconds of all cores, which other work on the machine
    does not lengthen."""
    taken = []
    for _ in range(TIMES):
        begun = time.perf_counter(), time.process_time()
        do()
        taken.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    wall, cores = (statistics.median(column) for column in zip(*taken, strict=True))
    return {"seconds": round(wall, 3), "core_seconds": round(cores, 3)}


def main() -> None:
    folder = Path(sys.argv[1]) / "checksums"
    files, mib = (int(word) for word in [*sys.argv[2:], "8", "128"][:2])
    path = folder / "iter_0000001"
    path.mkdir(parents=True)
    for number in range(files):
        (path / f"__{number}_0.distcp").write_bytes(os.urandom(mib * 2**20))
    upstream.put_on_path(upstream.locate())
    from megatron.core.dist_checkpointing.validation import (
        save_integrity_manifest,
        verify_integrity_manifest,
    )

    took = {
        "upstream_writes": measure(lambda: save_integrity_manifest(str(path))),
        "upstream_compares": measure(lambda: verify_integrity_manifest(str(path))),
        "settle_in_background": measure(lambda: checkpoints.settle(path)),
        "compare": measure(lambda: checksums.differing(path, checksums.read(path) or {})),
    }
    assert not checksums.differing(path, checksums.read(path) or {})
    shutil.rmtree(folder)
    found = {
        "gib": files * mib / 1024,
        "files": files,
        "cores": len(os.sched_getaffinity(0)),
        "cpu": platform.machine(),
        "load_average": round(os.getloadavg()[0], 1),
        **took,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
