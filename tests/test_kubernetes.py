"""Kubernetes jobs, checked by the published models of JobSet's and Kubeflow Trainer's API."""

import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_batch_v1_job_spec import IoK8sApiBatchV1JobSpec
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob

from harness import cli
from harness.errors import UserError
from harness.experiment.catalog import load_catalog
from harness.launching import kubernetes
from harness.planning.plan import plan

NEEDED = {"IMAGE": "registry.example/team/megatron-harness:1", "CLAIM": "megatron"}
TWO_NODES = {"NODES": "2", "GPUS": "16"}


def job(id_="219", **settings):
    settings = {"K8S": "1", **NEEDED, **settings}
    planned = plan(load_catalog().find(id_), {**settings, "DEVICE": "cuda"}, "cuda")
    return kubernetes.render(planned, settings)


def launched(found):
    """The pod of a JobSet."""
    return found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


ALL = TWO_NODES | {
    "NAMESPACE": "research",
    "QUEUE": "gpu",
    "RDMA": "rdma/ib:8",
    "STEPS": "20",
    "SAVE": "1",
}


@pytest.mark.parametrize(
    ("settings", "model"),
    [
        (ALL | {"K8S": "jobset", "HOST_NETWORK": "1", "RESTARTS": "3"}, JobsetV1alpha2JobSet),
        ({"id_": "101"}, JobsetV1alpha2JobSet),
        (ALL | {"K8S": "trainjob"}, TrainerV1alpha1TrainJob),
    ],
)
def test_the_published_schema_knows_every_field(settings, model):
    found = job(**settings)
    read = model.from_dict(found)
    assert read.to_dict() == found, "a field that the schema does not know is dropped"
    assert (read.api_version, read.kind) == (found["apiVersion"], found["kind"])


def test_a_field_of_another_name_is_noticed():
    spec = {"completionMode": "Indexed", "template": {"spec": {"hostNet": True, "containers": []}}}
    assert IoK8sApiBatchV1JobSpec.from_dict(spec).to_dict() != spec


def test_each_node_runs_a_launcher_that_knows_its_place():
    found = job(**TWO_NODES, STEPS="20", WANDB="offline", WANDB_NAME="$(rm)")
    name, spec = found["metadata"]["name"], found["spec"]
    assert spec["network"] == {"enableDNSHostnames": True, "subdomain": name}
    node = spec["replicatedJobs"][0]["template"]["spec"]
    assert (node["parallelism"], node["completions"], node["completionMode"]) == (2, 2, "Indexed")
    container = launched(found)["containers"][0]
    words = container["command"][container["command"].index("219") + 1 :]
    assert words == [
        "NODES=2",
        "GPUS=16",
        "STEPS=20",
        "WANDB=offline",
        "WANDB_NAME=$$(rm)",
        "NODE_RANK=$(JOB_COMPLETION_INDEX)",
        f"RENDEZVOUS={name}-node-0-0.{name}:29500",
        "DEVICE=cuda",
    ]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}


@pytest.mark.parametrize(
    ("settings", "resumes"),
    [
        ({"SAVE_EVERY": "100"}, ["RESUME=auto"]),
        ({"SAVE_EVERY": "100", "RESUME": "0"}, ["RESUME=0"]),
        ({}, []),
    ],
)
def test_pods_that_start_again_resume_a_run_with_checkpoints(settings, resumes):
    command = launched(job(**TWO_NODES, **settings))["containers"][0]["command"]
    assert [word for word in command if word.startswith("RESUME=")] == resumes


def test_one_node_needs_no_rendezvous():
    command = launched(job("101"))["containers"][0]["command"]
    assert command[-2:] == ["101", "DEVICE=cuda"]


def test_a_train_job_takes_its_place_from_kubeflow():
    trainer = job(**TWO_NODES, K8S="trainjob")["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert "NODE_RANK=$(PET_NODE_RANK)" in trainer["command"]
    assert "RENDEZVOUS=$(PET_MASTER_ADDR):$(PET_MASTER_PORT)" in trainer["command"]


def test_what_a_run_leaves_lies_on_the_claim():
    pod = launched(job("101"))
    mounts = {one["mountPath"]: one.get("subPath") for one in pod["containers"][0]["volumeMounts"]}
    folder = kubernetes.FOLDER
    assert mounts == {
        "/dev/shm": None,
        f"{folder}/outdir": "outdir",
        f"{folder}/weights": "weights",
    }
    assert {"name": "kept", "persistentVolumeClaim": {"claimName": "megatron"}} in pod["volumes"]
    assert pod["securityContext"] == {"fsGroup": kubernetes.GROUP}


def test_network_and_restarts():
    found = job(**TWO_NODES, RDMA="rdma/ib:4", RESTARTS="3", HOST_NETWORK="1")
    pod = launched(found)
    assert found["spec"]["failurePolicy"] == {"maxRestarts": 3}
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "rdma/ib": "4"}
    assert container["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    assert "hostNetwork" not in launched(job(**TWO_NODES))


def test_other_settings_have_another_name_and_pods_names_fit():
    names = {job(**TWO_NODES, STEPS=steps)["metadata"]["name"] for steps in ("20", "21")}
    assert len(names) == 2
    for name in names:
        assert len(f"{name}-node-0-1023-abcde") <= 63
        assert kubernetes._DNS_LABEL.fullmatch(name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"IMAGE": None}, "K8S=1 needs IMAGE="),
        ({"CLAIM": None}, "K8S=1 needs CLAIM="),
        ({"K8S": "2"}, "K8S=2: expected 1, jobset, trainjob"),
        ({"RDMA": "ib"}, "RDMA=ib: expected the resource"),
        ({"RESTARTS": "-1"}, "RESTARTS=-1: expected a number"),
        ({"NAMESPACE": "A_b"}, "NAMESPACE=A_b is not what Kubernetes takes"),
        ({"K8S": "trainjob", "HOST_NETWORK": "1"}, "a TrainJob cannot patch its pods' network"),
        ({"K8S": "trainjob", "RESTARTS": "3"}, "decides about restarts"),
        ({"SLURM": "1"}, "SLURM=1 and K8S=1: a run is a job of one of them"),
    ],
)
def test_what_kubernetes_cannot_take_is_refused(settings, said):
    given = {"K8S": "1", **NEEDED, **settings}
    given = {key: value for key, value in given.items() if value is not None}
    with pytest.raises(UserError) as refused:
        planned = plan(load_catalog().find("101"), {**given, "DEVICE": "cuda"}, "cuda")
        kubernetes.render(planned, given)
    assert said in str(refused.value)


def test_settings_of_jobs_need_a_job(capsys):
    assert cli.main(["run", "101", "CLAIM=megatron", "DRY_RUN=1"]) == 2
    assert "CLAIM=megatron is for a batch job, and K8S=1 is not given" in capsys.readouterr().err


def test_kubectl_creates_the_job(tmp_path, monkeypatch, capsys):
    """kubectl is replaced at its border."""
    log = tmp_path / "job.yaml"
    (tmp_path / "kubectl").write_text(f"#!/bin/bash\ncat >{log}\necho jobset/$1 created\n")
    (tmp_path / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    settings = ["K8S=1", *(f"{key}={value}" for key, value in NEEDED.items())]
    assert cli.main(["run", "101", *settings]) == 0
    created = yaml.safe_load(log.read_text())
    name = created["metadata"]["name"]
    assert created == job("101")
    assert f"jobset.sigs.k8s.io/jobset-name={name}" in capsys.readouterr().out
    (tmp_path / "kubectl").write_text("#!/bin/bash\necho forbidden >&2\nexit 1\n")
    assert cli.main(["run", "101", *settings]) == 2
    assert "kubectl refused the job: forbidden" in capsys.readouterr().err


def test_printed_yaml_is_what_kubectl_reads(capsys):
    settings = ["K8S=1", "DRY_RUN=1", *(f"{key}={value}" for key, value in NEEDED.items())]
    assert cli.main(["run", "101", *settings]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# 101-gpt2xl") and yaml.safe_load(printed) == job("101")
