"""Cluster profiles, ``CLUSTER=``: what a batch job needs on one cluster (``clusters/*.yaml``)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from harness import ROOT
from harness.errors import UserError, nearest
from harness.experiment.model import Checked, Count
from harness.system import yaml_files

FOLDER = ROOT / "clusters"
DEFAULT = "generic"
CONTAINERS = ("pyxis", "apptainer", "singularity")

Words = Annotated[tuple[str, ...], Field(strict=False)]
_OPTION = re.compile(r"[a-z][a-z-]*")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Container(Checked):
    """How a job's processes enter a container.

    Attributes:
        kind: Pyxis is a plugin of srun; Apptainer and Singularity are commands.
        image: a file, or an address that the kind understands; IMAGE= names another.
        mounts: folders of the host to show inside, besides those of the run: ``/a`` or ``/a:/b``.
        options: of srun for Pyxis, else of the command.
        command: of Apptainer or Singularity: ``run`` starts the image's own environment first.
    """

    kind: Literal["pyxis", "apptainer", "singularity"]
    image: str | None = None
    mounts: Words = ()
    options: Words = ()
    command: Literal["exec", "run"] = "exec"


class Cluster(Checked):
    """One cluster.

    Attributes:
        about: what it is, in a line.
        tried: where and when its jobs ran; ``rendered, never run`` where they did not.
        sources: pages that its values come from.
        gpus: whose GPUs they are.
        gpus_per_node: how many a node has; None: unknown.
        gpu_option: the option of sbatch by which GPUs are asked for.
        cpus_per_gpu: a rank's main thread, two data loaders and NCCL's proxy thread, or more.
        options: of sbatch, by name, such as ``{partition: gpu, mem: 480G}``; an empty value is a
            switch.
        srun: options of srun.
        setup: lines of bash before anything starts, such as ``module load``.
        environment: variables of every process.
        arguments: Megatron-LM's own, as ARGS= takes them.
        numa_binding: see NUMA_BINDING=.
    """

    about: str
    tried: str
    sources: Words = ()
    gpus: Literal["nvidia", "amd"] = "nvidia"
    gpus_per_node: Count | None = None
    gpu_option: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    cpus_per_gpu: Count = 4
    options: dict[str, str] = Field(default_factory=dict)
    srun: Words = ()
    setup: Words = ()
    environment: dict[str, str] = Field(default_factory=dict)
    container: Container | None = None
    arguments: str = ""
    numa_binding: str | None = None

    @field_validator("options", "environment")
    @classmethod
    def _plain(cls, given: dict[str, str], info) -> dict[str, str]:
        """Names that would not end up as one option, and values that would end its line."""
        pattern, kind = (
            (_OPTION, "option of sbatch, such as partition")
            if info.field_name == "options"
            else (_VARIABLE, "environment variable")
        )
        for name, value in given.items():
            if not pattern.fullmatch(name):
                raise ValueError(f"{name!r} is no {kind}")
            if not value.isprintable():
                raise ValueError(f"{name}: {value!r} has characters that are not printable")
        return given

    def settings(self, given: Mapping[str, str]) -> dict[str, str]:
        """``given`` with what this cluster adds to a run's settings."""
        found = dict(given)
        if self.arguments:
            found["ARGS"] = f"{self.arguments} {given.get('ARGS', '')}".strip()
        if self.numa_binding:
            found.setdefault("NUMA_BINDING", self.numa_binding)
        return found


def find(settings: Mapping[str, str]) -> Cluster:
    """The profile that ``CLUSTER=`` names, a name in ``clusters/`` or a file, with ``CONTAINER=``
    and ``IMAGE=`` applied.

    Raises:
        UserError: there is none, it is malformed, or a container has no image.
    """
    wanted = settings.get("CLUSTER", DEFAULT)
    cluster = read(_path(wanted))
    container, kind = cluster.container, settings.get("CONTAINER")
    if kind == "0":
        container = None
    elif kind:
        if kind not in CONTAINERS:
            raise UserError(f"CONTAINER={kind}; {nearest(kind, ('0', *CONTAINERS))}")
        same = container and container.kind == kind
        container = container if same else Container(kind=kind)
    if image := settings.get("IMAGE"):
        if container is None:
            raise UserError(
                f"IMAGE={image}: how are containers started there? CONTAINER=pyxis, apptainer or"
                " singularity"
            )
        container = container.model_copy(update={"image": image})
    if container and not container.image:
        raise UserError(
            f"CLUSTER={wanted} runs in a container ({container.kind}) and has no image: name one,"
            " IMAGE=file, or CONTAINER=0"
        )
    return cluster.model_copy(update={"container": container})


def read(path: Path) -> Cluster:
    """The profile in ``path``. Raises UserError where it is malformed."""
    cluster = yaml_files.build(Cluster, yaml_files.read(path), path.name)
    try:
        shlex.split(cluster.arguments)
    except ValueError as error:
        raise UserError(f"{path.name}: arguments = {cluster.arguments!r}: {error}") from None
    return cluster


def names() -> list[str]:
    """The profiles in ``clusters/``."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def _path(wanted: str) -> Path:
    if "/" in wanted or wanted.endswith((".yaml", ".yml")):
        path = Path(wanted).expanduser()
        if not path.is_file():
            raise UserError(f"CLUSTER={wanted}: there is no such file")
        return path
    if wanted not in names():
        raise UserError(
            f"CLUSTER={wanted}; {nearest(wanted, names())}; or the path of a profile of your own,"
            " such as CLUSTER=./mine.yaml"
        )
    return FOLDER / f"{wanted}.yaml"
