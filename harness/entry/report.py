"""What a rank records about itself: its place, memory peaks, failure, stacks in a hang."""

import contextlib
import faulthandler
import gc
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from harness.entry import on_cpu
from harness.machine import gpus
from harness.run.directory import RUN_DIR_VARIABLE, RunDir
from harness.run.schema import LaunchRate, Rank, RankError, StepMetrics
from harness.system.files import write_json
from harness.system.masking import mask

GIB = 2**30
EVERY_S = 10
EARLY_STEPS = 2
"""Steps that are always reported: memory grows until the optimizer state exists, after step 1."""


class RankReport:
    """Writes ``ranks/<rank>.json`` while the rank runs, and its error or stacks if it fails.

    Attributes:
        at_end: called after training.
        on_metrics: called with each line of metrics.jsonl, on the rank that writes it.
        asked_to_end: see ``harness.run.schema.Rank``.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.run_dir = run_dir
        self.rank = int(os.environ.get("RANK", 0))
        self.is_last = self.rank == int(os.environ.get("WORLD_SIZE", 1)) - 1
        self.step = 0
        self.at_end: list[Callable[[], None]] = []
        self.on_metrics: list[Callable[[StepMetrics], None]] = []
        self.phase_medians_ms: Callable[[], dict[str, float]] = dict
        self.launch: LaunchRate | None = None
        self.asked_to_end = False
        self._gc_ms: dict[int, float] = {}
        self._gc_began_s = 0.0
        self._written_s = 0.0
        self._gpu = None
        run_dir.ranks.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Write the first report; from now on record stacks and garbage collections.

        Stacks are written on SIGUSR1, which the launcher sends in a hang, and on a crash.
        """
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1, self._file("stacks.txt").open("a"))
        gc.callbacks.append(self._time_collection)
        self.write()

    def after_step(self, step: int) -> None:
        """Write a report if this is one of the first steps or the last report is old."""
        self.step = step
        if step <= EARLY_STEPS or time.monotonic() - self._written_s > EVERY_S:
            self.write()

    def write(self) -> None:
        """Write ``ranks/<rank>.json``: peaks so far, in GiB."""
        self._written_s = time.monotonic()
        rank = Rank(
            rank=self.rank,
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            pid=os.getpid(),
            host=socket.gethostname(),
            coordinates=_coordinates(),
            rss_peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
            gc_ms=self._gc_ms,
            launch=self.launch,
            **{f"{phase}_ms": ms for phase, ms in self.phase_medians_ms().items()},
            step=self.step,
            asked_to_end=self.asked_to_end,
            **self._gpu_memory(),
        )
        write_json(self._file("json"), rank.model_dump())

    def failed(self, error: BaseException) -> None:
        """Write ``ranks/<rank>.error.json``."""
        found = RankError(
            rank=self.rank,
            type=type(error).__name__,
            message=mask(str(error)),
            traceback=mask("".join(traceback.format_exception(error))),
            time=time.time(),
            step=self.step,
        )
        write_json(self._file("error.json"), found.model_dump())
        # after a GPU failure, reading its memory may raise; the rank must end all the same
        with contextlib.suppress(Exception):
            self.write()  # memory peaks at the failure

    def finished(self) -> None:
        """Write the last report; remove the stacks' file if it is empty."""
        self.write()
        stacks = self._file("stacks.txt")
        if not stacks.stat().st_size:
            stacks.unlink()

    def _time_collection(self, moment: str, collection: dict) -> None:
        """Add the time of a full collection to the current step (``gc.callbacks``)."""
        if collection["generation"] < 2:
            return
        if moment == "start":
            self._gc_began_s = time.perf_counter()
        else:
            took_ms = (time.perf_counter() - self._gc_began_s) * 1e3
            self._gc_ms[self.step + 1] = self._gc_ms.get(self.step + 1, 0.0) + took_ms

    def _file(self, suffix: str) -> Path:
        return self.run_dir.ranks / f"{self.rank}.{suffix}"

    def _gpu_memory(self) -> dict:
        """Device name; on a GPU also peaks of PyTorch's allocator, and memory used of the whole GPU
        as nvidia-smi shows it, in GiB."""
        if on_cpu():
            return {"device": "cpu"}
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return {}
        return {
            "device": torch.cuda.get_device_name(),
            "allocated_peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "reserved_peak_gib": torch.cuda.max_memory_reserved() / GIB,
            "nvml_used_gib": self._nvml_used_gib(torch),
        }

    def _nvml_used_gib(self, torch: ModuleType) -> float | None:
        try:
            import pynvml
        except ImportError:
            return None
        try:
            if self._gpu is None:
                pynvml.nvmlInit()
                uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
                self._gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            return gpus.memory(pynvml, self._gpu).used / GIB
        except pynvml.NVMLError:
            return None


def report_of_this_run() -> RankReport | None:
    """The report of this rank; None without a run directory."""
    path = os.environ.get(RUN_DIR_VARIABLE)
    return RankReport(RunDir(Path(path))) if path else None


def _coordinates() -> dict[str, int]:
    """This rank's coordinates; empty before upstream has initialised model parallelism."""
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return {}
    return {
        "tp": state.get_tensor_model_parallel_rank(),
        "pp": state.get_pipeline_model_parallel_rank(),
        "cp": state.get_context_parallel_rank(),
        "dp": state.get_data_parallel_rank(),
        "ep": state.get_expert_model_parallel_rank(),
    }
