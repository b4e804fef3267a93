"""Take a picture of a real terminal: type commands into tmux, wait, draw what its screen shows as SVG.

    .venv/bin/python docs/images/capture.py docs/images/make-101.svg 'make 101\\t' Enter     (needs tmux; \\t is the tab key)
"""

import io
import subprocess
import sys
import time

COLUMNS, ROWS, PATIENCE_S = 100, 34, 600


def tmux(*words: str) -> str:
    return subprocess.run(["tmux", "-L", "capture", *words], check=True, capture_output=True, text=True).stdout


def main() -> None:
    target, *keys = sys.argv[1:]
    shell = 'PS1="$ "; source /usr/share/bash-completion/bash_completion; clear'
    tmux("new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), "bash --norc --noprofile")
    try:
        tmux("send-keys", shell, "Enter")
        time.sleep(2)
        for key in keys:
            *typed, last = key.split("\\t")
            for part in typed:
                tmux("send-keys", "-l", part)
                tmux("send-keys", "Tab")
                time.sleep(1)
            tmux("send-keys", *(["Enter"] if last == "Enter" else ["-l", last]))
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(2)
            screen = tmux("capture-pane", "-e", "-p")
            if [line for line in screen.splitlines() if line.strip()][-1].strip() == "$":
                break
    finally:
        tmux("kill-server")
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(screen.rstrip().removesuffix("$").rstrip()))
    console.print()  # rich cuts off what hangs below the last line
    console.save_svg(target, title="megatron-harness")


if __name__ == "__main__":
    main()
