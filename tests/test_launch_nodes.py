"""Several launchers of one run: they meet, agree before anything trains, and hear of each other's end."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.data import data_sets
from harness.errors import UserError
from harness.launching.outcome import Evidence, classify
from harness.launching.rendezvous import agreement, connections, handshake
from harness.launching.rendezvous.handshake import refusals_sent
from harness.planning.script import Extras, Place
from harness.run.checkpoints import Loading, Saving

sys.path.insert(0, str(Path(__file__).parent))
from test_launch import make_plan, of_run, run, start, the_run, until

HOST = socket.gethostname()
STARTED: list[subprocess.Popen] = []


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def rendezvous() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture(autouse=True)
def none_outlives_its_test():
    yield
    for launcher in STARTED:
        launcher.kill()
        launcher.wait()
    STARTED.clear()


def start_node(
    node: int, outdir: Path, rendezvous: str, *arguments: object, **environment: str
) -> subprocess.Popen:
    arguments = arguments or ("ok", 2, 20, 0.05)
    STARTED.append(
        start(outdir, *arguments, NODE_RANK=str(node), RENDEZVOUS=rendezvous, **environment)
    )
    return STARTED[-1]


def ended(*launchers: subprocess.Popen) -> list[tuple[int, str]]:
    """Exit status and output of each, once they have ended."""
    printed = [launcher.communicate(timeout=60)[0] for launcher in launchers]
    return [(launcher.returncode, text) for launcher, text in zip(launchers, printed, strict=True)]


def test_a_further_node_joins_the_directory_of_node_0(tmp_path, rendezvous):
    second = start_node(1, tmp_path / "out", rendezvous)
    time.sleep(0.3)
    first = start_node(0, tmp_path / "out", rendezvous)
    outputs = [text for status, text in ended(first, second) if status == 0]
    directory = the_run(tmp_path / "out")
    assert directory.read_result().status == "ok" and directory.read_running().pid == first.pid
    assert (
        "hello" in directory.logs.read_text() and "hello" in directory.logs_of_node(1).read_text()
    )
    assert (
        "node 1 waits for node 0" in outputs[1]
        and f"node 0 waits at {rendezvous} for node 1, 10 minutes" in outputs[0]
    )


def test_node_0_shows_steps_and_losses_that_another_file_system_has(tmp_path, rendezvous):
    nodes = [
        start_node(node, tmp_path / f"disk{node}", rendezvous, "ok", 2, 8, 0.05) for node in (0, 1)
    ]
    (first, second) = ended(*nodes)
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    own, other = the_run(tmp_path / "disk0"), the_run(tmp_path / "disk1")
    assert other.label == f"{own.label}.node1"
    result = own.read_result()
    assert (result.steps_done, result.loss.last, result.window) == (8, pytest.approx(9.2), (6, 8))
    assert own.metrics.read_text() == other.metrics.read_text()
    assert result.memory_gib.reserved == 5.0, "of the fullest rank, which is on node 1"
    assert "8/8  loss 9.2000" in first[1] and "ok, 8 of 8 steps" in first[1]


@pytest.mark.parametrize(("steps", "changes", "said"), [
    (20, '{"lr": 0.1}', "experiment lr: none on node 0, 0.1 on node 1"),
    (6, "{}", "experiment steps: 20 on node 0, 6 on node 1"),
])  # fmt: skip
def test_nodes_that_would_not_run_the_same_are_all_refused(
    tmp_path, rendezvous, steps, changes, said
):
    first = start_node(0, tmp_path / "out", rendezvous)
    second = start_node(1, tmp_path / "out", rendezvous, "ok", 2, steps, 0.05, CHANGES=changes)
    for status, text in ended(first, second):
        assert (
            status == 2
            and f"node 0 ({HOST}) and node 1 ({HOST}) would not run the same\n  {said}\n" in text
        )
        assert "give all nodes the same settings" in text
    assert not (tmp_path / "out").exists()


def test_what_nodes_compare(tmp_path, monkeypatch):
    def known(**changes) -> dict:
        return agreement.facts(make_plan(tmp_path, "ok", **changes))

    def differs(**changes) -> list[str]:
        return [
            line.split(":")[0]
            for line in agreement.differences(before, known(**changes), ("node 0", "node 1"))
        ]

    before = known()
    assert differs() == []
    assert differs(overrides={"LR": "typed otherwise"}) == []
    assert differs(extra_args=("--clip-grad", "0.1"), mbs=2) == [
        "experiment micro_batch_size",
        "experiment extra_args",
    ]
    assert differs(extras=Extras(saving=Saving(every=3))) == [
        "checkpoints every",
        "checkpoints folder",
    ]
    assert differs(extras=Extras(loading=Loading(tmp_path, 5))) == [
        "starts from step",
        "starts from weights only",
    ]
    monkeypatch.setattr(
        agreement, "package_version", lambda name: "9.9" if name == "numpy" else None
    )
    monkeypatch.setattr(agreement, "source_commit", lambda tree: ("another", False))
    found = differs()
    assert (
        {"packages numpy", "harness commit"}
        <= set(found)
        <= {key for key in before if key.startswith(("packages", "harness"))}
    )
    monkeypatch.undo()
    sources = tmp_path / "sources"
    (sources / "below").mkdir(parents=True)
    (sources / "below" / "a.py").write_text("1")
    one = agreement._sources(sources)
    (sources / "below" / "a.py").write_text("2")
    assert agreement._sources(sources) != one


def test_other_text_under_the_name_of_a_data_set_is_another_data_set(tmp_path, monkeypatch):
    known = []
    for node, content in enumerate((b"\1\0\2\0", b"\1\0\3\0")):
        home = tmp_path / str(node) / "mine"
        home.mkdir(parents=True)
        for end, written in (("bin", content), ("idx", b"the same")):
            (home / f"mine_text_document.{end}").write_bytes(written)
        prefix = home / "mine_text_document"
        mine = data_sets.DataSet(
            "mine", prefix, "NullTokenizer", None, 10, "same", 1, 1, 2, fingerprint=""
        )
        monkeypatch.setattr(data_sets, "blend", lambda _, mine=mine: data_sets.Blend((mine,)))
        known.append(agreement.facts(make_plan(tmp_path, "ok", data="mine")))
    (line,) = agreement.differences(*known, ("node 0", "node 1"))
    assert line.startswith("data mine bin ends: ")


def test_a_node_that_does_not_come_is_named_in_bounded_time(tmp_path, rendezvous):
    for node, said in (
        (0, f"node 1 did not connect to RENDEZVOUS={rendezvous} within"),
        (1, "node 0 did not answer within"),
    ):
        ((status, text),) = ended(start_node(node, tmp_path / "out", rendezvous, TIMEOUT_S="0.6"))
        assert status == 2 and said in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_node_that_refuses_by_itself_tells_the_others(tmp_path, rendezvous, refusing):
    waiting = start_node(1 - refusing, tmp_path / "out", rendezvous)
    assert "waits" in waiting.stdout.readline()
    with (
        pytest.raises(UserError, match=r"^no such data$"),
        refusals_sent([f"RENDEZVOUS={rendezvous}", f"NODE_RANK={refusing}"]),
    ):
        raise UserError("no such data")
    ((status, text),) = ended(waiting)
    assert status == 2 and f"error: node {refusing} ({HOST}) refuses: no such data" in text
    assert not (tmp_path / "out").exists()


def test_nobody_is_told_of_what_would_only_be_shown(rendezvous, monkeypatch):
    monkeypatch.setattr(handshake, "_send_refusal", lambda *_: pytest.fail("it told"))
    for words in (
        [],
        [f"RENDEZVOUS={rendezvous}", "DRY_RUN=1"],
        [f"RENDEZVOUS={rendezvous}", "SLURM=1"],
        ["RENDEZVOUS=nonsense"],
    ):
        with pytest.raises(UserError, match="no"), refusals_sent(words):
            raise UserError("no")


def test_a_directory_that_node_0_cannot_make_ends_all(tmp_path, rendezvous):
    (tmp_path / "file").touch()
    nodes = (
        start_node(0, tmp_path / "file", rendezvous),
        start_node(1, tmp_path / "out", rendezvous),
    )
    for (status, text), refused in zip(
        ended(*nodes),
        ("error: cannot write to", f"node 0 ({HOST}) refuses: cannot write to"),
        strict=True,
    ):
        assert status == 2 and refused in text


def test_a_directory_that_a_further_node_cannot_make_ends_all(tmp_path, rendezvous):
    (tmp_path / "file").touch()
    first = start_node(0, tmp_path / "out", rendezvous, "ok", 2, 1000, 0.05)
    second = start_node(1, tmp_path / "file", rendezvous, "ok", 2, 1000, 0.05)
    (own, other) = ended(first, second)
    assert (
        other[0] == 2
        and own[0] == 2
        and f"node 1 ({HOST}): cannot write to {tmp_path}/file" in own[1]
    )
    assert not of_run(the_run(tmp_path / "out").path)


def test_a_host_without_an_address_is_named_at_once(tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(connections.socket, "getaddrinfo", unknown)
    for node in ("0", "1"):
        with pytest.raises(
            UserError,
            match=r"RENDEZVOUS=nowhere:29500: the host nowhere has no address here: Name or service",
        ):
            run(make_plan(tmp_path / "out", "ok", nodes=2, place=Place(node, "nowhere:29500")))
    assert not (tmp_path / "out").exists()


def test_a_rendezvous_port_of_another_program_is_refused_with_a_free_one(tmp_path, monkeypatch):
    monkeypatch.setattr(handshake, "HELLO_S", 0.3)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"another program has port {port}; try RENDEZVOUS=127.0.0.1:\d+"
        ):
            run(make_plan(tmp_path, "ok", nodes=2, place=Place("0", f"127.0.0.1:{port}")))
        with pytest.raises(UserError, match="another program has that port"):
            run(make_plan(tmp_path, "ok", nodes=2, place=Place("1", f"127.0.0.1:{port}")))


def test_strangers_at_the_port_do_not_disturb(tmp_path, rendezvous):
    first = start_node(0, tmp_path / "out", rendezvous)
    first.stdout.readline()
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\xff\n", b"[1]\n", b'{"harn'):
        with socket.create_connection(connections.host_and_port(rendezvous)) as stranger:
            stranger.sendall(said)
    silent = socket.create_connection(connections.host_and_port(rendezvous))
    (own, other) = ended(first, start_node(1, tmp_path / "out", rendezvous))
    silent.close()
    assert (own[0], other[0]) == (0, 0), own[1]


def test_a_number_that_comes_twice_or_is_too_high_is_refused():
    def admit(node: int, others: dict) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            handshake._admit(
                connections.Connection(ours),
                {handshake.PROTOCOL: 1, "node": node, "host": "b\033[2J", "facts": {}},
                others,
                {},
                3,
            )

    there: dict = {}
    admit(1, there)
    for node, said in (
        (1, r"NODE_RANK=1 came twice, from b\\x1b\[2J and from b\\x1b\[2J"),
        (3, "NODE_RANK=3 came from .*, and NODES=3"),
        (0, "NODE_RANK=0"),
    ):
        with pytest.raises(UserError, match=said):
            admit(node, dict(there))


def test_ctrl_c_while_it_waits_ends_the_node_that_waits_for_it(tmp_path, rendezvous):
    first = start_node(0, tmp_path / "out", rendezvous, TIMEOUT_S="60")
    assert "waits" in first.stdout.readline()
    first.send_signal(signal.SIGINT)
    second = start_node(1, tmp_path / "out", rendezvous, TIMEOUT_S="5")
    (own, other) = ended(first, second)
    assert own[0] == 130 and other[0] == 2 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("behaviour", "status", "rank", "said"), [
    ("killed", "crash", 3, "ended by SIGKILL"),
    ("oom", "oom", 3, "CUDA out of memory"),
])  # fmt: skip
def test_node_0_names_the_node_and_the_rank_that_failed(
    tmp_path, rendezvous, shared, behaviour, status, rank, said
):
    first = start_node(0, tmp_path / "a", rendezvous, "ok", 2, 2000, 0.05, GRACE_S="1")
    second = start_node(
        1, tmp_path / ("a" if shared else "b"), rendezvous, behaviour, 2, 2000, 0.05
    )
    (own, other) = ended(first, second)
    result = the_run(tmp_path / "a").read_result()
    assert own[0] == 1 and other[0] == 1
    assert (result.status, result.rank) == (status, rank) and said in result.detail
    assert said in own[1] and not of_run(the_run(tmp_path / "a").path)


@pytest.mark.parametrize(("restarts", "again"), [("0", True), ("2", True), ("3", False)])
def test_a_job_that_lost_a_node_starts_again_but_not_for_ever(
    tmp_path, rendezvous, restarts, again
):
    files = tmp_path / "slurm-77"
    job = {"HARNESS_JOB": "77", "HARNESS_JOB_FILES": str(files), "SLURM_RESTART_COUNT": restarts}
    first = start_node(0, tmp_path / "out", rendezvous, "ok", 2, 1000, 0.05, **job)
    second = start_node(1, tmp_path / "out", rendezvous, "ok", 2, 1000, 0.05)
    until(lambda: len(of_run_here(tmp_path)) and the_run(tmp_path / "out").read_metrics())
    second.kill()
    ended(first)
    assert files.with_suffix(".again").exists() == again


def of_run_here(tmp_path: Path) -> list:
    return list((tmp_path / "out").glob("*/metrics.jsonl"))


def test_a_launcher_that_was_killed_is_named_and_the_run_ends(tmp_path, rendezvous):
    first = start_node(0, tmp_path / "a", rendezvous, "ok", 2, 2000, 0.05, GRACE_S="1")
    second = start_node(1, tmp_path / "b", rendezvous, "ok", 2, 2000, 0.05)
    until(
        lambda: any((tmp_path / "a").glob("*")) and len(the_run(tmp_path / "a").read_metrics()) > 2
    )
    second.kill()
    ((status, text),) = ended(first)
    result = the_run(tmp_path / "a").read_result()
    assert status == 1 and result.status == "crash"
    assert (
        f"node 1 ({HOST}): its launcher no longer answers: it was killed" in result.detail
        and "no longer answers" in text
    )
    until(lambda: not of_run(the_run(tmp_path / "b").path))
    second.communicate()


def test_a_further_node_resumes_what_node_0_has_resumed_already(tmp_path, rendezvous):
    finished, _ = run(make_plan(tmp_path, "ok", ranks=2, steps=3))
    resumed = {"RESUMES": str(finished.dir.path)}
    first = start_node(0, tmp_path, rendezvous, **resumed)
    assert "waits" in first.stdout.readline()
    (own, other) = ended(first, start_node(1, tmp_path, rendezvous, **resumed))
    assert (own[0], other[0]) == (0, 0), own[1] + other[1]
    assert (
        the_run(tmp_path).read_result().status == "ok"
        and (finished.dir.path / "logs.1.txt").exists()
    )


def test_ranks_that_only_follow_do_not_count_as_the_cause():
    experiment = make_plan(Path("/x"), "ok").experiment
    echo = "[rank0]: RuntimeError: Connection closed by peer [127.0.0.1]:29500"
    log = f"[rank0]: Traceback (most recent call last):\n{echo}\n"
    assert classify(Evidence(exit_code=1, log=log), experiment).is_consequence
    assert classify(Evidence(exit_code=1), experiment).is_consequence
    assert not classify(
        Evidence(exit_code=1, log=log.replace("Connection closed by peer", "no such layer")),
        experiment,
    ).is_consequence
    assert not classify(
        Evidence(exit_code=1, log=f"{log}CUDA out of memory\n"), experiment
    ).is_consequence
