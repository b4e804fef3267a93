"""What torchrun starts for each rank: ``torchrun … -m harness.entry <upstream's arguments>``."""

import os
import signal

from harness.entry import on_cpu
from harness.system.orphans import end_with


def main() -> None:
    """Run this rank. On a CPU, all ranks of a node are forked from one that imported everything."""
    end_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a rank without a traceback
    if on_cpu() and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        from harness.entry import warm

        warm.become_rank(_prepare)
    from harness.entry import rank

    rank.run()


def _prepare() -> None:
    from harness.entry import rank

    rank.prepare_for_forks()


if __name__ == "__main__":  # processes that multiprocessing starts import this module too
    main()
