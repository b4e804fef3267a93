"""Last stage: a plan that can be launched, and its bash script, which ``make show-<id>`` prints."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from harness import ROOT
from harness.data import data_sets
from harness.data.splits import samples_of
from harness.experiment.experiment import Experiment
from harness.experiment.identity import Difference
from harness.run.checkpoints import Loading, Saving
from harness.run.directory import RunDir
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

NUMA_BINDINGS = ("node", "socket", "exclusive", "core-complex")
"""How torchrun binds ranks to cores near their GPU: torch/numa/binding.py."""
WIDTH = 86
"""Characters of a line, from which a group of arguments is broken."""


@dataclass(frozen=True)
class Place:
    """Where a run happens.

    Attributes:
        node_rank: which of its nodes this is; ``$SLURM_NODEID`` in a batch job.
        rendezvous: where several nodes meet, host:port.
        gpu_ids: the GPUs that it uses, by NVML index; None: as many as it needs, from the first.
        memory_fraction: see ``harness.upstreams.megatron_lm.environment.variables``.
        numa_binding: one of NUMA_BINDINGS; None: the kernel places ranks.
    """

    node_rank: str = "0"
    rendezvous: str | None = None
    gpu_ids: tuple[int, ...] | None = None
    memory_fraction: float | None = None
    numa_binding: str | None = None


@dataclass(frozen=True)
class Extras:
    """What a run does apart from training: it keeps checkpoints, begins with one, logs to Weights &
    Biases."""

    saving: Saving | None = None
    loading: Loading | None = None
    tracking: Tracking | None = None


@dataclass(frozen=True)
class Plan:
    """One run, ready to launch.

    Attributes:
        full: the experiment at full size.
        experiment: what runs on ``device``.
        headline: in what it differs from the published run; None: in nothing.
        resumes: the run directory of the run that it resumes.
        changed: settings in which it differs from the run that it resumes.
        notices: what its user should know before it starts.
    """

    full: Experiment
    experiment: Experiment
    device: Device
    place: Place
    outdir: Path
    headline: str | None
    extras: Extras = Extras()
    resumes: RunDir | None = None
    changed: tuple[Difference, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def first_step(self) -> int:
        """The step after which it resumes; 0 where it begins anew."""
        loading = self.extras.loading
        return loading.step if loading and not loading.only_weights else 0

    def script(self, gpu_ids: tuple[int, ...] | None = None) -> str:
        """The run's bash script, on these GPUs (by default those of ``place``)."""
        place = self.place if gpu_ids is None else replace(self.place, gpu_ids=gpu_ids)
        return render(
            self.experiment,
            self.device,
            place,
            headline=self.headline,
            apex=importlib.util.find_spec("apex") is not None,
            extras=self.extras,
        )


def render(
    experiment: Experiment,
    device: Device,
    place: Place = Place(),
    *,
    headline: str | None = None,
    apex: bool = False,
    extras: Extras = Extras(),
) -> str:
    """The whole script for ``experiment``.

    Args:
        place: node and GPUs; several nodes need ``place.rendezvous``.
        headline: a comment below the experiment's name, such as what a miniature scaled.
        apex: see ``harness.upstreams.megatron_lm.flags.megatron_flags``.

    Raises:
        UserError: the experiment's data set is not prepared.
    """
    groups = [
        _torchrun(experiment, place),
        ["-m", "harness.entry"],
        *_quoted(megatron_flags(experiment, device, apex=apex)),
        *_quoted(_extra_flags(experiment, extras)),
        *_in_run_dir(extras),
    ]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# {experiment.name}: {experiment.shows}",
            *([f"# {headline}"] if headline else []),
            "set -eu",
            f"cd {shlex.quote(str(ROOT))}",
            f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
            *_exports(experiment, device, place, extras),
            *_index_mappings(experiment),
            "exec torchrun " + " \\\n    ".join(line for group in groups for line in _wrap(group)),
            "",
        ]
    )


def _exports(experiment: Experiment, device: Device, place: Place, extras: Extras) -> Iterator[str]:
    """A line for each environment variable, with its reason."""
    environment = variables(
        experiment,
        device,
        memory_fraction=place.memory_fraction,
        tracking=extras.tracking,
        keep=extras.saving and extras.saving.keep,
    )
    found = [(v.name, shell_word(v.value), v.reason) for v in environment]
    if place.gpu_ids is not None:
        ids = ",".join(map(str, place.gpu_ids))
        found.append(("CUDA_DEVICE_ORDER", "PCI_BUS_ID", "numbers as nvidia-smi shows them"))
        found.append(("CUDA_VISIBLE_DEVICES", ids, "the GPUs chosen for this run"))
    width = max(len(f"export {name}={value}") for name, value, _ in found)
    for name, value, reason in found:
        yield f"{f'export {name}={value}':{width}}  # {reason}"


def _extra_flags(experiment: Experiment, extras: Extras) -> Iterator[list[str]]:
    if extras.loading:
        yield loading_flags(extras.loading)
    if extras.saving:
        folder = extras.saving.folder
        yield (["--save", str(folder)] if folder else []) + saving_flags(experiment, extras.saving)
    if extras.tracking:
        yield tracking_flags(extras.tracking, experiment.label)


def _in_run_dir(extras: Extras) -> Iterator[list[str]]:
    """Arguments that name a folder of the run directory; a script run by hand has none."""
    folders = {"--tensorboard-dir": "/tensorboard"}
    if extras.tracking:
        folders = {"--wandb-save-dir": ""} | folders
    if extras.saving and not extras.saving.folder:
        folders = {"--save": "/checkpoints"} | folders
    for option, folder in folders.items():
        yield [f"${{HARNESS_RUN_DIR:+{option}", f'"$HARNESS_RUN_DIR{folder}"}}']


def _index_mappings(experiment: Experiment) -> list[str]:
    """The line that builds the index of samples, once on a node and before its ranks start."""
    if experiment.data == data_sets.MOCK or data_sets.is_chat(experiment.data):
        return []
    samples = samples_of(
        experiment.steps,
        experiment.global_batch_size,
        experiment.eval_interval,
        experiment.eval_steps,
    )
    settings = [
        f"DATA={experiment.data}",
        f"SEQ={experiment.seq_length}",
        f"SAMPLES={','.join(map(str, samples))}",
        f"SPLIT={experiment.split}",
    ]
    return [f"python3 -m harness data mappings {' '.join(map(shell_word, settings))}"]


def _torchrun(experiment: Experiment, place: Place) -> list[str]:
    # Without --log-dir, torchrun leaves an empty temporary folder of every run.
    ranks = ["--nproc-per-node", str(experiment.ranks_per_node), "--log-dir", os.devnull]
    if place.numa_binding:
        ranks += ["--numa-binding", place.numa_binding]
    if experiment.nodes == 1:
        # Otherwise torchrun takes the machine's own name, and waits for ever where it has no
        # address (containers, VPNs).
        return ["--standalone", "--local-addr", "127.0.0.1", *ranks]
    options = {
        "--nnodes": str(experiment.nodes),
        "--node-rank": _text_or_variable(place.node_rank),
        "--rdzv-backend": "c10d",
        "--rdzv-endpoint": _text_or_variable(place.rendezvous or ""),
        "--rdzv-id": experiment.id,
    }
    return [*chain.from_iterable(options.items()), *ranks]


def shell_word(text: str) -> str:
    """``text`` quoted as one word for bash; control characters other than line breaks and tabs are
    escaped, so that a terminal that shows the script does not obey them."""
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


def _text_or_variable(value: str) -> str:
    """``value`` quoted, unless it is a variable that Slurm or its script sets, such as
    ``$SLURM_NODEID``."""
    return value if re.fullmatch(r"\$[A-Z_]+", value) else shell_word(value)


def _quoted(groups: Iterable[list[str]]) -> list[list[str]]:
    return [[shell_word(word) for word in group] for group in groups]


def _wrap(words: list[str]) -> list[str]:
    """Break a group into lines; an argument and its values stay on one line."""
    lines: list[str] = []
    for word in words:
        if lines and (not word.startswith("-") or len(lines[-1]) + len(word) < WIDTH):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
