"""Parity holds, and a broken parallelism breaks it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.parity import LAYOUTS

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parent.parent

FAULTS = {
    "chunks of the sequence in plain order": (
        "cp2 all_gather",
        "from harness.cpu import attention; import torch\n"
        "attention.sequence_positions = lambda size, sequence: torch.arange(sequence)",
    ),
    "norms' gradients not summed over tensor-parallel ranks": (
        "tp2 sp",
        "finalize = sys.modules['megatron.core.distributed.finalize_model_grads']\n"
        "finalize._allreduce_non_tensor_model_parallel_grads = lambda *args, **kwargs: None",
    ),
    "one rank's gradients a thousandth too large": (
        "dp2",
        "from megatron.core.distributed import DistributedDataParallel as DDP; import os\n"
        "start = DDP.finish_grad_sync\n"
        "def wrong(self, *args, **kwargs):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        for buffer in self.buffers: buffer.grad_data *= 1.001\n"
        "    return start(self, *args, **kwargs)\n"
        "DDP.finish_grad_sync = wrong",
    ),
    "a rank that fails": (
        "pp2",
        "import os; from megatron.training import training; step = training.train_step\n"
        "def fail(*args, iteration, **kwargs):\n"
        "    if os.environ['RANK'] == '1' and iteration == 3: raise RuntimeError('planted')\n"
        "    return step(*args, iteration=iteration, **kwargs)\n"
        "training.train_step = fail",
    ),
}


def parity(program: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600
    )


SLOWER = {
    "pp2 vpp2 fused gradients",
    "ep2 fused gradients",
    "pp2 vpp2 of a hybrid",
    "dp2 zero of Mamba layers",
    "tp2 of Mamba layers",
    "recompute of Mamba layers",
}
"""Layouts of which others are like: make test-full has them."""


def test_every_layout_equals_one_process():
    names = [name for name in LAYOUTS if name not in SLOWER]
    done = parity(f"import sys; from harness import parity; sys.exit(parity.main({names!r}))")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count(" equal\n") >= len(names)
    assert "DIFFERS" not in done.stdout


@pytest.mark.full
def test_slower_layouts_and_the_harnesss_own_script_do_so_too():
    done = parity("import sys; from harness import parity; sys.exit(parity.main())")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count(" equal\n") >= len(LAYOUTS)
    assert "DIFFERS" not in done.stdout
    if os.environ.get("MEGATRON_LM"):
        models = {model.name for model, _ in LAYOUTS.values()}
        assert done.stdout.count("harness's own script") == len(models)


LONG = (
    "one rank's gradients a thousandth too large",
    "a rank that fails",
    "chunks of the sequence in plain order",
)


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=[pytest.mark.full] * (fault in LONG)) for fault in FAULTS],
)
def test_a_broken_parallelism_is_found(fault):
    layout, breaking = FAULTS[fault]
    program = "import sys; from harness import parity; from harness.entry import rank\n"
    program += "import os; os.environ['HARNESS_DEVICE'] = 'cpu'; rank.prepare()\n"
    done = parity(f"{program}{breaking}\nsys.exit(parity.main([{layout!r}]))")
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    (row,) = [line for line in done.stdout.splitlines() if line.startswith(f"tiny, {layout}")]
    assert ("RuntimeError: planted" if fault == "a rank that fails" else "DIFFERS") in row
