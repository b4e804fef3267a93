"""PyTorch's ``fully_shard`` on a mesh of CPUs, where upstream asks for one of CUDA devices."""

from torch.distributed.device_mesh import DeviceMesh


def install() -> None:
    """Let a mesh made from a process group be one of CPUs."""
    from_group = DeviceMesh.from_group

    def of_cpus(group, device_type, *args, **kwargs):
        return from_group(group, "cpu", *args, **kwargs)

    DeviceMesh.from_group = staticmethod(of_cpus)
