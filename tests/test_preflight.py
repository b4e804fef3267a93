"""``make preflight``: what a machine can do, its file, and what is slow."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

pytest.importorskip("torch", reason="the set-up stage `heavy` is not installed")

from harness.errors import UserError
from harness.predict import calibrations, machine_file, rates
from harness.predict.machine_file import GpuRates, Machine, NetworkRate
from harness.predict.network import Group
from harness.preflight import commands, layers, links, node, peers, shapes
from harness.preflight.show import _rows, show


def gpu(index: int, **changed) -> GpuRates:
    rates = {
        "index": index,
        "uuid": f"GPU-{index}",
        "first_tflops": 770.0,
        "sustained_tflops": 690.0 + index,
        "copy_gb_per_s": 4200.0,
        "to_device_gb_per_s": 54.0,
        "pairs_gb_per_s": {other: 296.0 for other in range(8) if other != index},
        "sm_clock_mhz": 1425,
        "power_w": 689.1,
        "temperature_c": 54,
    }
    return GpuRates(**rates | changed)


def machine(*gpus: GpuRates, **changed) -> Machine:
    fields = {
        "device": "cuda",
        "quick": False,
        "gpu": "NVIDIA H200",
        "cpu": "Xeon",
        "cores": 32,
        "host": "node0",
        "software": {"torch": "2.11.0"},
        "measured": "2026-11-30T03:00:00+00:00",
        "seconds": 41.0,
        "launch": {"add_us": 7.7, "operation_us": 42.4},
        "gpus": gpus or tuple(map(gpu, range(8))),
        "memory": {
            "copy_gb_per_s": 4200,
            "add_gb_per_s": 4350,
            "norm_gb_per_s": 2750,
            "gelu_gb_per_s": 3100,
        },
        "storage": {
            "to_device_gb_per_s": 54,
            "to_host_gb_per_s": 54,
            "disk_write_gb_per_s": 0.7,
        },
        "products": [
            {"direction": "forward", "rows": 16384, "columns": 6400, "inner": 1600, "us": 535.8}
        ],
    }
    return Machine(**fields | changed)


def test_equal_gpus_are_not_slow() -> None:
    assert peers.slow(machine()) == []


def test_one_slow_gpu_of_eight_is_named_with_its_state_and_what_to_do() -> None:
    gpus = [gpu(index) for index in range(8)]
    gpus[5] = gpu(5, sustained_tflops=520.0, sm_clock_mhz=1110, power_w=450.2)
    (said,) = peers.slow(machine(*gpus))
    assert said.startswith(
        "GPU 5: sustained product 520 TFLOP/s, 75% of the node's median 692"
        " (1110 MHz, 450 W, 54 °C)\n"
    )
    assert "GPUS_IDS=0,1,2,3,4,6,7 runs without it" in said


def test_just_above_the_limit_is_not_slow() -> None:
    gpus = [gpu(index, copy_gb_per_s=4000.0) for index in range(8)]
    gpus[2] = gpu(2, copy_gb_per_s=3401.0)
    assert peers.slow(machine(*gpus)) == []
    gpus[2] = gpu(2, copy_gb_per_s=3399.0)
    assert "GPU 2: memory copy 3,399 GB/s, 85%" in peers.slow(machine(*gpus))[0]


def test_a_slow_link_is_named_once_by_both_gpus() -> None:
    gpus = [gpu(index) for index in range(8)]
    for one, other in ((1, 6), (6, 1)):
        gpus[one] = gpu(one, pairs_gb_per_s=gpus[one].pairs_gb_per_s | {other: 25.0})
    (said,) = peers.slow(machine(*gpus))
    assert said.startswith("GPU 1 to GPU 6: link 25 GB/s, 8% of the node's median 296")


def test_processes_of_a_cpu_are_not_compared() -> None:
    one, other = gpu(0), gpu(1, sustained_tflops=1.0)
    assert peers.slow(machine(one, other, device="cpu", gpu=None)) == []


def test_a_machine_file_is_read_as_it_was_written(tmp_path) -> None:
    path = tmp_path / "outdir" / "machine.json"
    machine_file.write(path, machine())
    assert machine_file.read(path) == machine()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "is no complete machine file"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version"),
        (lambda text: text.replace('"sustained_tflops"', '"tflops"'), "sustained_tflops"),
        (lambda text: "", "is no complete machine file"),
    ],
    ids=["half-written", "another version", "a field with another name", "empty"],
)
def test_a_damaged_machine_file_is_refused(tmp_path, damage, said) -> None:
    path = tmp_path / "machine.json"
    machine_file.write(path, machine())
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=said) as refused:
        machine_file.read(path)
    assert "make preflight" in str(refused.value)


def test_a_missing_machine_file_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="make preflight measures this machine"):
        machine_file.read(tmp_path / "machine.json")


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8])
def test_every_rank_meets_every_other_once_and_both_at_the_same_time(ranks) -> None:
    rounds = list(zip(*(links.partners(rank, ranks) for rank in range(ranks)), strict=True))
    met = set()
    for partners in rounds:
        for rank, partner in enumerate(partners):
            if partner is not None:
                assert partners[partner] == rank
                met.add((rank, partner))
    assert len(met) == ranks * (ranks - 1)


def test_products_to_measure_are_those_of_the_catalogue() -> None:
    found = shapes.products()
    # 111: 15 sequences of 1,024 tokens, GPT-2 XL's first matrix of the MLP
    assert (15 * 1024, 6400, 1600) in found
    assert len(shapes.chosen_products("cuda", quick=False)) == shapes.MOST_PRODUCTS


def test_times_are_medians_over_the_ranks_that_measured_them() -> None:
    def rate(size: int, us: float) -> dict:
        return {"name": "all_reduce", "ranks": 3, "size": size, "us": us, "launch_us": 2 * us}

    found = node.medians([[rate(1, 10), rate(2, 5)], [rate(1, 30)], [rate(1, 20), rate(2, 7)]])
    assert found == [rate(1, 20), rate(2, 6)]


def test_what_is_shown_has_the_data_sheets_figure(capsys) -> None:
    show(machine(failures=("layer: fsdp: RuntimeError: no",)))
    said = capsys.readouterr().out
    assert re.search(r"GPU 3: product, sustained +693 TFLOP/s +990 +70%", said)
    assert re.search(r"GPU 3: memory copy +4,200 GB/s +4,800 +88%", said)
    assert "not measured: layer: fsdp: RuntimeError: no" in said


def test_busy_gpus_are_refused_with_the_idle_ones(monkeypatch) -> None:
    from harness.machine import gpus
    from harness.machine.gpus import GpuUse, LocalGpu

    there = [LocalGpu(index, "NVIDIA H200", f"GPU-{index}", 143771.0) for index in range(3)]
    uses = tuple(GpuUse(one, 70.0 if one.index == 1 else 0.1) for one in there)
    monkeypatch.setattr(gpus, "list_gpus", lambda: tuple(there))
    monkeypatch.setattr(gpus, "use", lambda: uses)
    with pytest.raises(UserError) as refused:
        commands.idle_gpus(None)
    assert "GPU 1: 70.0 GiB used" in str(refused.value)
    assert "GPUS_IDS=0,2 measures the idle ones" in str(refused.value)
    assert commands.idle_gpus((0, 2)) == (0, 2)
    with pytest.raises(UserError, match="no GPU 7"):
        commands.idle_gpus((7,))


def test_a_rank_that_fails_early_is_said_with_its_output(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(node, "MODULE", "harness.no_such_module")
    with pytest.raises(UserError, match=r"No module named harness\.no_such_module"):
        node.measure("cpu", (), True, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_hangs_costs_no_other(tmp_path, monkeypatch) -> None:
    """The ranks leave what they measured, and say at what they were when the time was over."""
    finished = {"failures": []} | {
        name: getattr(machine(), name).model_dump() for name in ("launch", "memory", "storage")
    }
    finished |= {
        "rates": [770.0, 690.0],
        "gpu": {},
        "products": [rate.model_dump() for rate in machine().products],
    }

    def hang(device, gpu_ids, ranks, quick, folder) -> str:
        for rank in range(ranks):
            left = finished | {"doing": "layer: dense" if rank else None}
            (folder / f"{rank}.json").write_text(json.dumps(left))
        (folder / "log").write_text("")
        return "did not end in 180 s"

    monkeypatch.setattr(node, "run_ranks", hang)
    found = node.measure("cpu", (), False, tmp_path)
    assert found.failures == ("layer: dense: rank 1 did not end in 180 s",)
    assert found.products == machine().products


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path, monkeypatch) -> None:
    """Ctrl-C, or a scheduler's SIGTERM, ends the ranks and leaves what they wrote."""
    ended = []

    class Interrupted:
        pid = os.getpid()

        def __init__(self, *args, **kwargs) -> None:
            pass

        def wait(self, timeout=None) -> int:
            if timeout:
                raise KeyboardInterrupt
            return 0

        def poll(self) -> None:
            return None

    monkeypatch.setattr(node.subprocess, "Popen", Interrupted)
    monkeypatch.setattr(node.os, "killpg", lambda pid, number: ended.append(number))
    assert node.run_ranks("cpu", (), 2, True, tmp_path) == "was interrupted"
    assert ended == [signal.SIGTERM]


def test_ranks_without_the_first_parts_make_no_machine_file(tmp_path, monkeypatch) -> None:
    def die(device, gpu_ids, ranks, quick, folder) -> str:
        for rank in range(ranks):
            (folder / f"{rank}.json").write_text(json.dumps({"failures": [], "doing": "memory"}))
        (folder / "log").write_text("CUDA error: an illegal memory access")
        return "failed with status 1"

    monkeypatch.setattr(node, "run_ranks", die)
    with pytest.raises(UserError, match=r"failed with status 1 .* at: memory\nCUDA error"):
        node.measure("cpu", (), False, tmp_path)


def test_layers_that_need_a_gpu_or_more_ranks_are_left_out() -> None:
    assert "fp8 tensorwise" not in layers.kinds("cpu", 2)
    assert "tensor parallel" not in layers.kinds("cuda", 1)
    assert {"dense", "fp8 tensorwise", "64 experts"} <= set(layers.kinds("cuda", 1))


def test_a_cpu_is_measured_in_miniature(tmp_path, capfd) -> None:
    settings = {"QUICK": "1", "DEVICE": "cpu", "OUTDIR": str(tmp_path)}
    assert commands.preflight(settings) == 0
    assert "sustained product" in capfd.readouterr().out
    found = machine_file.read(tmp_path / "machine.json")
    assert found.device == "cpu" and found.quick and len(found.gpus) == node.CPU_RANKS
    assert found.failures == ()
    assert found.memory.copy_gb_per_s > 0 and found.launch.add_us > 0
    assert {rate.name for rate in found.collectives} == {"all_reduce", "all_gather", "send"}
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]


@pytest.mark.full
def test_nodes_measure_the_network_between_them(tmp_path) -> None:
    """Two nodes on this machine, two processes each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = f"127.0.0.1:{free.getsockname()[1]}"
    words = ["preflight", "QUICK=1", "DEVICE=cpu", "NODES=2", f"RENDEZVOUS={rendezvous}"]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "harness", *words, f"NODE_RANK={rank}", f"OUTDIR={tmp_path / str(rank)}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=280)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0]
    for rank in range(2):
        machine = machine_file.read(tmp_path / str(rank) / machine_file.NAME)
        assert {rate.ranks for rate in machine.between_nodes} == {2}
        assert {rate.stride for rate in machine.between_nodes} == {node.CPU_RANKS}
        assert {rate.name for rate in machine.between_nodes} == {"all_reduce", "all_gather", "send"}
        assert (
            machine.nodes_gb_per_s.keys() == {1 - rank} and min(machine.nodes_gb_per_s.values()) > 0
        )
        assert f"to node {1 - rank}, a GPU to its peer" in said[rank]


@pytest.mark.parametrize(
    "settings",
    [{"NODE_RANK": "0"}, {"RENDEZVOUS": "localhost:29500"}, {"NODE_RANK": "2", "RENDEZVOUS": "localhost:29500"}],
)  # fmt: skip
def test_several_nodes_need_a_rendezvous_and_a_rank(settings) -> None:
    with pytest.raises(UserError, match="NODE_RANK, 0 to 1"):
        commands.preflight({"NODES": "2", "DEVICE": "cpu"} | settings)


def test_a_slow_node_is_named_and_the_network_is_as_fast_as_measured() -> None:
    machine = machine_file.read(next((rates.FOLDER / "h200-141gb").glob("*0706.json")))
    sent = {"name": "all_gather", "ranks": 4, "stride": 8, "launch_us": 50.0}
    measured = machine.model_copy(
        update={
            "nodes_gb_per_s": {1: 44.0, 2: 45.0, 3: 20.0},
            "between_nodes": (NetworkRate(size=2**28, us=2**28 * 0.75 / 30e3, **sent),),
        }
    )
    assert [line.partition(":")[0] for line in peers.slow(measured)] == ["node 3"]
    assert "all-gather of 256 MiB" in "".join(what for what, *_ in _rows(measured))
    here = calibrations.load()["h200"].model_copy(update={"here": measured})
    network = here.speed().network
    assert network.bytes_per_s(Group(4, 8)) == pytest.approx(30e9)
