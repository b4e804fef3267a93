"""How fast completion, `make -n`, `make list` and `make show` answer, each with an idle process.

.venv/bin/python benchmarks/front_door.py        writes benchmarks/front_door.json
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = 15
# As for a user: with it, Python would compile every module anew in each run.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
COMPLETE = r"""
source /usr/share/bash-completion/bash_completion; { _comp_load make || _completion_loader make; } 2>/dev/null
[[ -z $OURS ]] || source scripts/completion.bash
complete=$(complete -p make | sed "s/.*-F \([^ ]*\).*/\1/")
COMP_WORDS=(make "$TYPED"); COMP_CWORD=1; COMP_LINE="make $TYPED"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9
start=$EPOCHREALTIME; $complete make "$TYPED" make; end=$EPOCHREALTIME
echo $(( ${end/./} - ${start/./} )) ${#COMPREPLY[@]}
"""
HEAVY = ("torch", "matplotlib", "megatron")


def wall_ms(*command: str, cwd: Path = ROOT) -> float:
    start = time.perf_counter()
    subprocess.run(command, cwd=cwd, stdout=subprocess.DEVNULL, check=True)
    return 1000 * (time.perf_counter() - start)


def complete(typed: str, ours: bool) -> tuple[float, int]:
    """Milliseconds of bash's completion, and how many targets it offers."""
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TYPED": typed, "OURS": "1" * ours},
    )
    microseconds, offered = done.stdout.split()
    return int(microseconds) / 1000, int(offered)


def heavy_imports(*words: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "harness", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    imported = {
        line.rsplit("|", 1)[1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if "|" in line
    }
    return sorted(imported & {*HEAVY})


def main() -> None:
    with tempfile.TemporaryDirectory() as empty:
        Path(empty, "Makefile").write_text("MAKEFLAGS += -rR\nnothing: ; @true\n")
        idle_make = (
            "`make -n` of an empty Makefile",
            lambda: wall_ms("make", "-n", "nothing", cwd=Path(empty)),
        )
        idle_python = ("`python -c pass`", lambda: wall_ms(sys.executable, "-c", "pass"))
        measured = {
            "`make 1<tab>`, bash-completion": (lambda: complete("1", False)[0], *idle_make),
            "`make 1<tab>`, completion.bash": (lambda: complete("1", True)[0], *idle_make),
            "`make <tab>`, completion.bash": (lambda: complete("", True)[0], *idle_make),
            "`make -n 101`": (lambda: wall_ms("make", "-n", "101"), *idle_make),
            "`make list`": (lambda: wall_ms("make", "list"), *idle_python),
            "`make show-101`": (lambda: wall_ms("make", "show-101"), *idle_python),
            "`make show-408`": (lambda: wall_ms("make", "show-408"), *idle_python),
        }
        rows = []
        for what, (ours, beside, idle) in measured.items():
            pairs = [(ours(), idle()) for _ in range(RUNS)]
            rows.append(
                {
                    "what": what,
                    "ms": statistics.median(a for a, _ in pairs),
                    "worst_ms": max(a for a, _ in pairs),
                    "beside": beside,
                    "ratio": statistics.median(a / b for a, b in pairs),
                }
            )
    imports = {words: heavy_imports(*words.split()) for words in ("list", "show 408", "table")}
    result = {
        "machine": f"{platform.processor() or platform.machine()}, {platform.python_version()}",
        "runs": RUNS,
        "rows": rows,
        "offered": {
            "bash-completion": complete("", False)[1],
            "completion.bash": complete("", True)[1],
        },
        "heavy_imports": imports,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['what']:34} {row['ms']:6.1f} ms, worst {row['worst_ms']:6.1f}, {row['ratio']:5.1f} x {row['beside']}"
        )
    for by, offered in result["offered"].items():
        print(f"`make <tab>`, {by}: {offered} targets")
    for words, found in imports.items():
        print(f"{words:10} imports of {', '.join(HEAVY)}: {', '.join(found) or 'none'}")


if __name__ == "__main__":
    main()
