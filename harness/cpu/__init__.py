"""Upstream's training loop on a CPU: one process per rank, gloo collectives, upstream unmodified.

``cuda``         stands in for ``torch.cuda``
``collectives``  collectives that NCCL has and gloo lacks
``norm``         layer norms under sequence parallelism
``attention``    attention under context parallelism
``experts``      experts with biases
``mamba``        the kernels of Mamba-2 layers
``recompute``    recomputation of single modules
``fsdp``         PyTorch's FSDP2 on CPUs
``checkpoints``  saving and loading
``fork_server``  the stand-in for checkpoint writers
"""

import logging
import multiprocessing
import runpy
from importlib.util import find_spec
from pathlib import Path

from harness.errors import UserError

KNOWN = ("0.19.0", "0.19.1", "0.19.2")
"""Versions of ``megatron.core`` this was written for. The source tree core_v0.19.0 calls itself
0.19.1; the wheel of the heavy stage is 0.19.2."""


def install() -> None:
    """Let ``megatron`` train on the CPU, in this process and its forks.

    Call it before ``megatron`` is imported: modules copy names of ``torch`` when they are imported.

    Raises:
        UserError: this was not written for the version of upstream.
    """
    package_info = Path(find_spec("megatron.core").origin).with_name("package_info.py")
    version = runpy.run_path(str(package_info))["__shortversion__"]
    if version not in KNOWN:
        raise UserError(
            f"megatron.core {version} does not run on a CPU: the stand-in for CUDA supports"
            f" {', '.join(KNOWN)}\ncheck out core_v0.19.0 (git submodule update --init"
            " megatron-lm), or run on a GPU"
        )
    from harness.cpu import collectives, cuda, mamba

    cuda.install()
    collectives.install()
    mamba.install()
    from harness.cpu import attention, checkpoints, experts, fsdp, norm, recompute

    experts.install()
    fsdp.install()
    norm.install()
    attention.install()
    recompute.install()
    checkpoints.install()
    multiprocessing.set_forkserver_preload([f"{__name__}.fork_server"])
    # The CPU's random state is also the device's here, so upstream's warning that one changed with
    # the other (megatron/core/tensor_parallel/random.py) means nothing.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
