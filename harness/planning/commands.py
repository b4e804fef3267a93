"""``make show-101`` and ``make checkpoints``."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

from harness.data import data_sets
from harness.data.definitions import Definition, definitions
from harness.experiment.catalog import load_catalog
from harness.planning import plan
from harness.planning.plan import Plan
from harness.run import checkpoint_list, checkpoints, finding


def show(id_: str, settings: Mapping[str, str]) -> int:
    """Print the script that would run; to print one, no GPU and no second node is needed."""
    device = plan.choose_device(settings, only_show=True)
    given = {"RENDEZVOUS": "first-node:29500", **settings}
    status = print_script(plan.plan(load_catalog().find(id_), given, device), settings)
    if device == "cpu" and "DEVICE" not in settings:
        print(
            f"# This is what runs here, without a GPU. At full size: make show-{id_} DEVICE=cuda",
            file=sys.stderr,
        )
    return status


def print_script(planned: Plan, settings: Mapping[str, str]) -> int:
    """Print the script of ``planned``, and on stderr what differs when it runs."""
    print(planned.script(), end="")
    wanted = planned.full.published_data
    if planned.full.data == data_sets.MOCK and "DATA" not in settings and wanted in made_here():
        print(
            f"# With mock data, because {wanted} is not prepared; make {planned.full.id} prepares"
            " it first.",
            file=sys.stderr,
        )
    return 0


def made_here() -> dict[str, Definition]:
    """Data sets of conversations that are made from a file of the repository, by name."""
    return {name: known for name, known in definitions().items() if known.chat}


def list_checkpoints(settings: Mapping[str, str]) -> int:
    """List checkpoints. VERIFY=1 compares all checksums, VERIFY=0 none; else a bounded amount."""
    read_bytes = {"0": 0.0, "1": math.inf}.get(settings.get("VERIFY"), checkpoints.LARGE_BYTES)
    return checkpoint_list.print_list(finding.outdir(settings), settings.get("RUN"), read_bytes)
