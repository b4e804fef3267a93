"""Stands in for torchrun and the ranks below it: ``torchrun.py BEHAVIOUR RANKS STEPS [SECONDS_A_STEP]``, without torch.

Like torchrun it starts every rank in a session of its own, passes SIGTERM on, ends the others when one fails, and ends
with a summary. Like harness.entry, ranks report themselves, their steps, their errors and, on SIGUSR1, their stacks.
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

BEHAVIOUR, RANKS, STEPS = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
STEP_S = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
RUN_DIR = Path(os.environ["HARNESS_RUN_DIR"])
FIRST_RANK = RANKS * int(os.environ.get("NODE_RANK", 0))
LAST_RANK = RANKS * (2 if "NODE_RANK" in os.environ else 1) - 1


def agent() -> int:
    if BEHAVIOUR == "port" and not (RUN_DIR / "second").exists():
        (RUN_DIR / "second").touch()
        print(
            "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network address"
        )
        return 1
    if BEHAVIOUR == "port-always":
        print("The server socket has failed to listen. name: EADDRINUSE")
        return 1
    ranks = []
    received = []  # only recorded: to wait in a handler deadlocks where it interrupted rank.poll()
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    for rank in range(FIRST_RANK, FIRST_RANK + RANKS):
        environment = os.environ | {"RANK": str(rank)}
        ranks.append(
            subprocess.Popen([sys.executable, *sys.argv], env=environment, start_new_session=True)
        )
    if BEHAVIOUR == "orphans":
        while not all((RUN_DIR / "ranks" / f"{rank}.json").exists() for rank in range(RANKS)):
            time.sleep(0.01)
        os._exit(1)
    while True:
        if received:
            for rank in ranks:
                rank.terminate()
            for rank in ranks:
                rank.wait()
            print(f"SignalException: Process {os.getpid()} got signal: {received[0]}")
            return 1
        codes = [rank.poll() for rank in ranks]
        if all(code == 0 for code in codes):
            return 0
        if failed := [rank for rank, code in enumerate(codes) if code]:
            for rank in ranks:
                rank.terminate()
            print(
                f"Root Cause (first observed failure):\n[0]:\n  time      : {time.strftime('%Y-%m-%d_%H:%M:%S')}\n"
                f"  host      : localhost\n  rank      : {FIRST_RANK + failed[0]} (local_rank: {failed[0]})\n"
                f"  exitcode  : {codes[failed[0]]} (pid: {ranks[failed[0]].pid})"
            )
            return 1
        time.sleep(0.01)


def rank(number: int) -> None:
    files = RUN_DIR / "ranks"
    if BEHAVIOUR in ("stubborn", "orphans"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    asked_to_end = []
    if BEHAVIOUR == "saves":
        signal.signal(signal.SIGUSR2, lambda *_: asked_to_end.append(True))
    if BEHAVIOUR == "saves-forever":
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1, (files / f"{number}.stacks.txt").open("a"))
    report = {"rank": number, "local_rank": number, "pid": os.getpid(), "host": os.uname().nodename}
    report["launch"] = {"add_us": 5.0 + number, "operation_us": 20.0 - number}
    memory = {
        "allocated_peak_gib": 1.0 + number,
        "reserved_peak_gib": 2.0 + number,
        "rss_peak_gib": 0.25,
    }
    temporary = files / f".{number}.tmp"
    temporary.write_text(json.dumps(report | memory))
    temporary.rename(files / f"{number}.json")
    if turn := os.environ.get("HARNESS_TURN"):
        print(f"[rank{number}]: imported at {time.time()}", flush=True)
        while not Path(turn).exists():
            time.sleep(0.01)
    print(f"[rank{number}]: hello, {os.environ.get('CUDA_VISIBLE_DEVICES', 'no')} GPUs")
    if number == FIRST_RANK:
        print("> building train, validation, and test datasets ...", flush=True)
    if BEHAVIOUR == "load-fails":
        trace = 'File "training.py", line 1, in setup\n  File "checkpointing.py", line 2, in load_checkpoint\n    torch.load()\n'
        error = {
            "type": "CheckpointException",
            "message": 'CheckpointException ranks:dict_keys([0])\n  File "x"\n'
            "_pickle.UnpicklingError: Unsupported operand 0\n",
            "traceback": trace,
            "rank": number,
            "time": time.time(),
        }
        (files / f"{number}.error.json").write_text(json.dumps(error))
        sys.exit(1)
    for step in range(1, STEPS + 1):
        time.sleep(STEP_S)
        if step == 3 and BEHAVIOUR == "hang":
            stuck_in_a_collective()
        if step == 3 and number == LAST_RANK:
            misbehave(number, step)
        if number == LAST_RANK:
            metrics = {
                "step": step,
                "loss": float(os.environ.get("LOSS", 10)) - step / 10,
                "step_ms": float(os.environ.get("STEP_MS", 100)) + step,
                "tflops": 2.0,
                "tokens_per_s": 50,
            }
            with (RUN_DIR / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics | {"time": time.time()}) + "\n")
        if asked_to_end:
            report_end(number, step, report)
            return
    if BEHAVIOUR in ("stubborn", "orphans"):
        time.sleep(1000)


def report_end(number: int, step: int, report: dict) -> None:
    """What a rank leaves after EXIT_SIGNAL: the first one records the checkpoint."""
    (RUN_DIR / "ranks" / f"{number}.json").write_text(json.dumps(report | {"asked_to_end": True}))
    if number == 0:
        times = {"blocked_ms": 1.0, "whole_after_s": 0.1, "time": time.time()}
        save = {"step": step, "asynchronous": True, "whole_at_step": step, "gib": 0.1, **times}
        (RUN_DIR / "saves.jsonl").write_text(json.dumps(save) + "\n")


def misbehave(number: int, step: int) -> None:
    if BEHAVIOUR == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if BEHAVIOUR == "oom":
        error = {
            "type": "OutOfMemoryError",
            "message": "CUDA out of memory. Tried to allocate 2.93 GiB.",
        }
        error |= {"rank": number, "time": time.time(), "step": step}
        (RUN_DIR / "ranks" / f"{number}.error.json").write_text(json.dumps(error))
        sys.exit(1)
    if BEHAVIOUR == "refused":
        print("pretrain_gpt.py: error: unrecognized arguments: --no-such-flag", flush=True)
        sys.exit(2)


def stuck_in_a_collective() -> None:
    time.sleep(1000)


if "RANK" in os.environ:
    rank(int(os.environ["RANK"]))
else:
    sys.exit(agent())
