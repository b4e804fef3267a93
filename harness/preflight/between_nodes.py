"""One rank of the measurement between nodes: messages that leave the node, by size.

``python -m harness.preflight.between_nodes DEVICE FOLDER``, started by torchrun on every node.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from harness.preflight import links
from harness.preflight.__main__ import BATCH_S, PART_S
from harness.preflight.clock import Clock
from harness.system.files import write_json

SIZES = {"cuda": links.SIZES, "cpu": links.SMALL_SIZES}


def main(device: str, folder: Path) -> None:
    """Measure, and keep what is known in ``FOLDER/<local rank>.json``.

    Ranks with the same place in their node exchange, all of these groups at the same time, so that
    each network card carries what it does in training.
    """
    local, per_node = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device == "cpu":
        from harness.cpu import install

        install()
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    else:
        torch.cuda.set_device(local)
        dist.init_process_group("nccl")
    clock = Clock(device, BATCH_S)
    ours = [dist.new_group(ranks) for ranks in _same_place(per_node)][local]
    faulthandler.dump_traceback_later(PART_S, exit=True)
    rates = links.collectives(clock, SIZES[device], device, ours)
    between = [rate.model_dump() | {"stride": per_node} for rate in rates]
    faulthandler.dump_traceback_later(PART_S, exit=True)
    pairs = links.pairs_gb_per_s(clock, device, ours)
    faulthandler.cancel_dump_traceback_later()
    write_json(folder / f"{local}.json", {"between_nodes": between, "nodes_gb_per_s": pairs})
    dist.barrier()
    dist.destroy_process_group()


def _same_place(per_node: int) -> Sequence[list[int]]:
    """The ranks of each place in a node."""
    return [list(range(place, dist.get_world_size(), per_node)) for place in range(per_node)]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
