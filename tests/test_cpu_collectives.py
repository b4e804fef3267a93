"""The stand-in for what NCCL has and gloo lacks, in a process of its own: it changes torch.distributed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parent.parent
GROUPS = """
from datetime import timedelta
import torch, torch.distributed as dist
from harness.cpu import collectives
collectives.install()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=7))
for group in (dist.group.WORLD, dist.new_group([0], timeout=timedelta(minutes=7))):
    options = group._get_backend(torch.device("cpu")).options
    assert (options._threads, options._timeout) == (1, timedelta(minutes=7)), (options._threads, options._timeout)
    share, whole = torch.tensor([1.0, 2.0]), torch.zeros(2)
    with dist._coalescing_manager(group, async_ops=True) as gathered:
        dist.all_gather_into_tensor(whole, share, group=group, async_op=True)
    gathered.wait()
    assert whole.equal(share)
"""


@pytest.mark.parametrize("interface", ["lo", None])
def test_a_gloo_group_has_one_thread(interface):
    environment = {
        name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"
    }
    environment |= {"GLOO_SOCKET_IFNAME": interface} if interface else {}
    done = subprocess.run(
        [sys.executable, "-c", GROUPS],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
