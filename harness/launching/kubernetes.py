"""Runs as Kubernetes jobs: a JobSet or a TrainJob of Kubeflow Trainer, one launcher on each node.

Fields are those of jobset.x-k8s.io/v1alpha2 and trainer.kubeflow.org/v1alpha1; their published
models check what is rendered in tests/test_kubernetes.py. Rendered, never run on a cluster.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.data import data_sets
from harness.errors import UserError
from harness.launching.slurm import LAUNCHER
from harness.planning.request import FOR_BATCH
from harness.system import yaml_files

if TYPE_CHECKING:
    from harness.planning.plan import Plan

KINDS = {"1": "jobset", "jobset": "jobset", "trainjob": "trainjob"}
"""``K8S=`` -> what is rendered."""
FOLDER = "/workspace/megatron-harness"
"""WORKDIR of docker/Dockerfile."""
KEPT = ("outdir", "weights")
"""Folders of the image that lie on the claim, besides those of data sets."""
PORT = 29500
GRACE_S = 300
"""From SIGTERM to SIGKILL when a pod is deleted: a checkpoint of a large model takes minutes."""
NAME_LENGTH = 40
"""A pod's name ends in -node-0-<index>-<five characters>, and has at most 63."""
GROUP = 2000
"""Pods get it as a group, and the claim belongs to it: the image's user is not root."""
NODE_GPUS = "nvidia.com/gpu"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
RUNTIME = "torch-distributed"
"""The ClusterTrainingRuntime that Kubeflow Trainer installs; its jobs and containers are called
``node``."""

_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_IMAGE = re.compile(r"[\w.:@/-]+")
_RESOURCE = re.compile(r"([a-z0-9.-]+/[\w.-]+):([1-9]\d*)")
REQUIRED = {
    "IMAGE": (
        _IMAGE,
        "registry.example/megatron-harness:1",
        "the image that the cluster's nodes pull: make docker-build, push it, then"
        " IMAGE=registry.example/megatron-harness:1",
    ),
    "CLAIM": (
        _DNS_LABEL,
        "megatron",
        "the PersistentVolumeClaim (ReadWriteMany) that keeps outdir/, data/ and weights/: without"
        " one, results end with the pod",
    ),
}
"""Settings that every job needs: what they look like, an example, and what they are."""
NOT_FOR_NODES = {
    "K8S",
    *FOR_BATCH["K8S"],
    *("DRY_RUN", "NODE_RANK", "RENDEZVOUS", "OUTDIR", "DEVICE"),
}


def create_or_print(plan: Plan, settings: Mapping[str, str]) -> int:
    """Create the job where kubectl exists (unless DRY_RUN=1), else print its YAML. Returns the exit
    status.

    Raises:
        UserError: a setting is malformed or missing, or the cluster refuses the job.
    """
    job = render(plan, settings)
    e = plan.experiment
    text = f"# {e.label}: {e.shows}\n" + yaml_files.text_of(job)
    kubectl = shutil.which("kubectl")
    if kubectl is None or settings.get("DRY_RUN") == "1":
        print(text, end="")
        if kubectl is None:
            print("# no kubectl here; kubectl create -f this file", file=sys.stderr)
        return 0
    done = subprocess.run(
        [kubectl, "create", "-f", "-"], input=text, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(
            f"kubectl refused the job: {done.stderr.strip()}\nmake {e.id}"
            f" K8S={settings['K8S']} DRY_RUN=1 shows it; kubectl delete -f removes an earlier one"
        )
    name = job["metadata"]["name"]
    print(
        f"{done.stdout.strip()}: {e.label}\n  kubectl get {job['kind'].lower()} {name}\n"
        f"  kubectl logs --follow --selector jobset.sigs.k8s.io/jobset-name={name}"
    )
    return 0


def render(plan: Plan, settings: Mapping[str, str]) -> dict[str, Any]:
    """The JobSet or TrainJob of ``plan`` as Kubernetes' API takes it.

    Raises:
        UserError: a setting is malformed, or one that the job needs is missing.
    """
    kind = KINDS.get(settings["K8S"])
    if kind is None:
        raise UserError(f"K8S={settings['K8S']}: expected {', '.join(KINDS)}")
    metadata: dict[str, Any] = {"name": job_name(plan.experiment.id, plan.experiment.label)}
    if namespace := _checked(settings, "NAMESPACE", _DNS_LABEL, "research"):
        metadata["namespace"] = namespace
    if queue := _checked(settings, "QUEUE", _DNS_LABEL, "gpu-queue"):
        metadata["labels"] = {QUEUE_LABEL: queue}
    spec = _job_set if kind == "jobset" else _train_job
    api, title = {
        "jobset": ("jobset.x-k8s.io/v1alpha2", "JobSet"),
        "trainjob": ("trainer.kubeflow.org/v1alpha1", "TrainJob"),
    }[kind]
    return {
        "apiVersion": api,
        "kind": title,
        "metadata": metadata,
        "spec": spec(plan, settings, metadata["name"]),
    }


def job_name(id_: str, label: str) -> str:
    """A DNS label (RFC 1123) for the run ``label`` of a row, short enough for its pods' names.

    Other settings have another name.
    """
    digest = hashlib.sha256(label.encode()).hexdigest()[:6]
    words = re.sub(r"[^a-z0-9]+", "-", label.lower()).removeprefix(f"{id_}-")
    start = f"run-{id_}-{words}"[: NAME_LENGTH - len(digest) - 1].rstrip("-")
    return f"{start}-{digest}"


def _job_set(plan: Plan, settings: Mapping[str, str], name: str) -> dict[str, Any]:
    nodes = plan.experiment.nodes
    # DNS names of pods: <JobSet>-<replicated job>-<its replica>-<index>.<subdomain>
    rendezvous = f"{name}-node-0-0.{name}:{PORT}"
    job = {
        "parallelism": nodes,
        "completions": nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one failed node restarts all of them
        "template": {
            "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": GRACE_S,
                **_network(settings),
                "securityContext": {"fsGroup": GROUP},
                "containers": [
                    {
                        "name": "launcher",
                        "image": _required(settings, "IMAGE"),
                        "workingDir": FOLDER,
                        "command": _command(plan, settings, "$(JOB_COMPLETION_INDEX)", rendezvous),
                        "resources": {"limits": _resources(plan, settings)},
                        **_privileges(settings),
                        "volumeMounts": _mounts(plan),
                    }
                ],
                "volumes": _volumes(settings),
            }
        },
    }
    return {
        "network": {"enableDNSHostnames": True, "subdomain": name},
        "failurePolicy": {"maxRestarts": _restarts(settings)},
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
    }


def _train_job(plan: Plan, settings: Mapping[str, str], name: str) -> dict[str, Any]:
    """Kubeflow Trainer starts one pod a node and says in PET_... which one it is
    (pkg/runtime/framework/plugins/torch/torch.go). Its runtime decides about restarts."""
    if "RESTARTS" in settings:
        raise UserError(
            f"RESTARTS={settings['RESTARTS']}: the runtime {RUNTIME} of a TrainJob decides about"
            " restarts; leave it out, or K8S=jobset"
        )
    if settings.get("HOST_NETWORK") == "1":
        raise UserError(
            "HOST_NETWORK=1: a TrainJob cannot patch its pods' network (PodSpecPatch in Kubeflow"
            " Trainer); leave it out, give RDMA=rdma/ib:8, or K8S=jobset"
        )
    pod = {
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": {"fsGroup": GROUP},
        "containers": [{"name": "node", **_privileges(settings), "volumeMounts": _mounts(plan)}],
        "volumes": _volumes(settings),
    }
    patch = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    rendezvous = "$(PET_MASTER_ADDR):$(PET_MASTER_PORT)"
    return {
        "runtimeRef": {"name": RUNTIME},
        "trainer": {
            "image": _required(settings, "IMAGE"),
            "command": _command(plan, settings, "$(PET_NODE_RANK)", rendezvous),
            "numNodes": plan.experiment.nodes,
            "numProcPerNode": plan.experiment.ranks_per_node,
            "resourcesPerNode": {"limits": _resources(plan, settings)},
        },
        "runtimePatches": [
            {
                "manager": "megatron-harness.example/launcher",
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [patch]}}},
            }
        ],
    }


def _command(plan: Plan, settings: Mapping[str, str], rank: str, rendezvous: str) -> list[str]:
    """The launcher's command; Kubernetes replaces $(NAME) in it."""
    words = [f"{key}={value}" for key, value in settings.items() if key not in NOT_FOR_NODES]
    words = [word.replace("$(", "$$(") for word in words]
    if plan.extras.saving and "RESUME" not in settings:
        words.append("RESUME=auto")  # pods that start again resume the run
    if plan.experiment.nodes > 1:
        words += [f"NODE_RANK={rank}", f"RENDEZVOUS={rendezvous}"]
    return [*LAUNCHER, plan.experiment.id, *words, "DEVICE=cuda"]


def _required(settings: Mapping[str, str], key: str) -> str:
    pattern, example, why = REQUIRED[key]
    value = _checked(settings, key, pattern, example)
    if value is None:
        raise UserError(f"K8S=1 needs {key}=, {why}")
    return value


def _resources(plan: Plan, settings: Mapping[str, str]) -> dict[str, str]:
    limits = {NODE_GPUS: str(plan.experiment.ranks_per_node)}
    if text := settings.get("RDMA"):
        found = _RESOURCE.fullmatch(text)
        if not found:
            raise UserError(
                f"RDMA={text}: expected the resource of the cluster's RDMA device plugin and how"
                " many a node gets, such as RDMA=rdma/ib:8"
            )
        limits[found[1]] = found[2]
    return limits


def _privileges(settings: Mapping[str, str]) -> dict[str, Any]:
    """RDMA locks memory."""
    if "RDMA" not in settings and settings.get("HOST_NETWORK") != "1":
        return {}
    return {"securityContext": {"capabilities": {"add": ["IPC_LOCK"]}}}


def _network(settings: Mapping[str, str]) -> dict[str, Any]:
    if settings.get("HOST_NETWORK") != "1":
        return {}
    return {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}


def _mounts(plan: Plan) -> list[dict[str, Any]]:
    """Only the data sets of the run: the image's data/ has the files that describe the others."""
    data = plan.experiment.data
    sets = () if data == data_sets.MOCK else data_sets.blend(data).sets
    folders = [*KEPT, *(f"data/{each.name}" for each in sets)]
    kept = [
        {"name": "kept", "mountPath": f"{FOLDER}/{folder}", "subPath": folder} for folder in folders
    ]
    return [{"name": "shared-memory", "mountPath": "/dev/shm"}, *kept]


def _volumes(settings: Mapping[str, str]) -> list[dict[str, Any]]:
    """NCCL and data loaders share memory between processes; Kubernetes' default is 64 MiB."""
    return [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        {"name": "kept", "persistentVolumeClaim": {"claimName": _required(settings, "CLAIM")}},
    ]


def _restarts(settings: Mapping[str, str]) -> int:
    text = settings.get("RESTARTS", "0")
    if not text.isdecimal():
        raise UserError(f"RESTARTS={text}: expected a number, such as RESTARTS=3")
    return int(text)


def _checked(
    settings: Mapping[str, str], key: str, pattern: re.Pattern[str], example: str
) -> str | None:
    value = settings.get(key)
    if value is not None and not pattern.fullmatch(value):
        raise UserError(f"{key}={value} is not what Kubernetes takes, such as {key}={example}")
    return value
