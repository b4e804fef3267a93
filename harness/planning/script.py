"""Last stage: the bash script that ``make show-<id>`` prints, ``make <id>`` executes, and a run
directory keeps."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from harness import ROOT
from harness.data import data_sets
from harness.data.splits import samples_of
from harness.experiment.experiment import Experiment
from harness.run.checkpoints import Loading, Saving
from harness.system.screen import harmless
from harness.upstreams.megatron_lm.environment import variables
from harness.upstreams.megatron_lm.flags import (
    Device,
    loading_flags,
    megatron_flags,
    saving_flags,
    tracking_flags,
)
from harness.upstreams.megatron_lm.tracking import Tracking

WIDTH = 110


@dataclass(frozen=True)
class Place:
    """Where a run happens.

    Attributes:
        node_rank: which of its nodes this is; ``$SLURM_NODEID`` in a batch job.
        rendezvous: where several nodes meet, host:port.
        gpu_ids: the GPUs that it uses, by NVML index; None: as many as it needs, from the first.
        memory_fraction: see ``harness.upstreams.megatron_lm.environment.variables``.
    """

    node_rank: str = "0"
    rendezvous: str | None = None
    gpu_ids: tuple[int, ...] | None = None
    memory_fraction: float | None = None


@dataclass(frozen=True)
class Extras:
    """What a run does apart from training: it keeps checkpoints, begins with one, logs to Weights &
    Biases."""

    saving: Saving | None = None
    loading: Loading | None = None
    tracking: Tracking | None = None


NOTHING_ELSE = Extras()


def render(
    e: Experiment,
    device: Device,
    place: Place = Place(),
    *,
    headline: str | None = None,
    apex: bool = False,
    extras: Extras = NOTHING_ELSE,
) -> str:
    """The whole script for ``e``.

    Args:
        place: node and GPUs; several nodes need ``place.rendezvous``.
        headline: a comment below the experiment's name, such as what a miniature scaled.
        apex: see ``harness.upstreams.megatron_lm.flags.megatron_flags``.
        extras: checkpoints and tracking.

    Raises:
        UserError: the experiment's data set is not prepared.
    """
    environment = variables(
        e,
        device,
        memory_fraction=place.memory_fraction,
        tracking=extras.tracking,
        keep=extras.saving and extras.saving.keep,
    )
    found = [(v.name, shell_word(v.value), v.reason) for v in environment]
    if place.gpu_ids is not None:
        found.append(("CUDA_DEVICE_ORDER", "PCI_BUS_ID", "numbers as nvidia-smi shows them"))
        found.append(
            (
                "CUDA_VISIBLE_DEVICES",
                ",".join(map(str, place.gpu_ids)),
                "the GPUs chosen for this run",
            )
        )
    width = max(len(f"export {name}={value}") for name, value, _ in found)
    exports = [f"{f'export {name}={value}':{width}}  # {reason}" for name, value, reason in found]
    groups = [
        _torchrun(e, place),
        ["-m", "harness.entry"],
        *_quoted(megatron_flags(e, device, apex=apex)),
        *_quoted(_extra_flags(e, extras)),
        *_in_run_dir(extras),
        ["${HARNESS_RUN_DIR:+--tensorboard-dir", '"$HARNESS_RUN_DIR/tensorboard"}'],
    ]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# {e.name}: {e.shows}",
            *([f"# {headline}"] if headline else []),
            "set -eu",
            f"cd {shlex.quote(str(ROOT))}",
            f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            *exports,
            *_index_mappings(e),
            "exec torchrun " + " \\\n    ".join(line for group in groups for line in _wrap(group)),
            "",
        ]
    )


def _extra_flags(e: Experiment, extras: Extras) -> list[list[str]]:
    saving, loading, tracking = extras.saving, extras.loading, extras.tracking
    groups = [
        loading_flags(loading) if loading else [],
        (
            [*(["--save", str(saving.folder)] if saving.folder else []), *saving_flags(e, saving)]
            if saving
            else []
        ),
        tracking_flags(tracking, e.label) if tracking else [],
    ]
    return [group for group in groups if group]


def _in_run_dir(extras: Extras) -> list[list[str]]:
    """Folders of the run directory, where there is one."""
    folders = {"--save": "/checkpoints"} if extras.saving and not extras.saving.folder else {}
    folders |= {"--wandb-save-dir": ""} if extras.tracking else {}
    return [
        [f"${{HARNESS_RUN_DIR:+{flag}", f'"$HARNESS_RUN_DIR{folder}"}}']
        for flag, folder in folders.items()
    ]


def _index_mappings(e: Experiment) -> list[str]:
    """The line that builds which tokens make which sample, once a node and before its ranks
    start."""
    if e.data == data_sets.MOCK or data_sets.is_chat(e.data):
        return []
    samples = samples_of(e.steps, e.global_batch_size, e.eval_interval, e.eval_steps)
    words = [
        f"DATA={e.data}",
        f"SEQ={e.seq_length}",
        f"SAMPLES={','.join(map(str, samples))}",
        f"SPLIT={e.split}",
    ]
    return [f"python3 -m harness data mappings {' '.join(map(shell_word, words))}"]


def _torchrun(e: Experiment, place: Place) -> list[str]:
    # without --log-dir an empty folder of every run stays in the folder of temporary files
    ranks = ["--nproc-per-node", str(e.ranks_per_node), "--log-dir", os.devnull]
    if e.nodes == 1:
        # torchrun takes the machine's own name otherwise, and waits for ever where it has no
        # address (containers, VPNs).
        return ["--standalone", "--local-addr", "127.0.0.1", *ranks]
    return [
        "--nnodes",
        str(e.nodes),
        "--node-rank",
        _word(place.node_rank),
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        _word(place.rendezvous or ""),
        "--rdzv-id",
        e.id,
        *ranks,
    ]


def shell_word(text: str) -> str:
    """``text`` as one word for bash, without a control character in it but line breaks and tabs."""
    if harmless(text, masked=False) == text:
        return shlex.quote(text)
    encoded = text.encode(errors="surrogateescape")
    return (
        "$'"
        + "".join(
            chr(b) if 32 <= b < 127 and chr(b) not in "\\'" else f"\\x{b:02x}" for b in encoded
        )
        + "'"
    )


def _word(value: str) -> str:
    """A word of the script: text, or one of the variables that Slurm or its script sets,
    ``$SLURM_NODEID``."""
    return value if re.fullmatch(r"\$[A-Z_]+", value) else shell_word(value)


def _quoted(groups: list[list[str]]) -> list[list[str]]:
    return [[shell_word(word) for word in group] for group in groups]


def _wrap(words: list[str]) -> list[str]:
    """Break a group into lines, an argument and its values together."""
    lines: list[str] = []
    for word in words:
        if lines and (not word.startswith("-") or len(lines[-1]) + len(word) < WIDTH - 24):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
