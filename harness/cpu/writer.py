"""Upstream's checkpoint writer on a CPU is given copies.

On a GPU the writer's first act is to copy the tensors to the host, and training waits for that. Here they are on the host
already and would be shared: the writer would write what training makes of them meanwhile. So they are copied before.
"""


def install() -> None:
    """Copy the tensors of a checkpoint when its writing is prepared."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    prepare = FileSystemWriterAsync.prepare_write_data

    def prepare_write_data(self, plan, planner) -> None:
        prepare(self, plan, planner)
        self.write_buckets = [
            (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (data, tensors) in self.write_buckets
        ]

    FileSystemWriterAsync.prepare_write_data = prepare_write_data
