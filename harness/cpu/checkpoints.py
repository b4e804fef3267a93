"""Saving and loading checkpoints on a CPU.

On a GPU the checkpoint writer first copies tensors to the host, and training waits for that
(``FileSystemWriterAsync``). Here tensors are on the host already and would be shared: the writer
would save values of later steps. So they are copied when the save is prepared.

When a checkpoint is loaded, upstream's distributed optimizer reads the step of PyTorch's Adam
before the first step, treats the step as one of the moments, and lets all parameters share one
counter (megatron/core/optimizer/distrib_optimizer.py). On a GPU, Transformer Engine's Adam keeps
the step in its parameter groups.

Each iterator over a data loader draws a seed from the CPU's random state, which is the device's
here. A resumed run makes new iterators, so its dropout would differ from that of an uninterrupted
run. So loaders have a random state of their own.
"""


def install() -> None:
    """Copy tensors when a save is prepared; give an optimizer a state before its first step."""
    import torch
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    prepare, state_dict = FileSystemWriterAsync.prepare_write_data, DistributedOptimizer.state_dict
    init = torch.utils.data.DataLoader.__init__
    load, set_states = (
        DistributedOptimizer.load_state_dict,
        DistributedOptimizer._set_main_param_and_optimizer_states,
    )

    def prepare_write_data(self, plan, planner) -> None:
        prepare(self, plan, planner)
        self.write_buckets = [
            (path, key, (data, [(item, tensor.clone()) for item, tensor in tensors]))
            for path, key, (data, tensors) in self.write_buckets
        ]

    def state_dict_with_steps(self) -> dict:
        adam = self.optimizer
        if isinstance(adam, torch.optim.Adam) and not adam.state:
            for parameter in (
                parameter for group in adam.param_groups for parameter in group["params"]
            ):
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self)

    def put_states(self, parameter, tensors) -> None:
        # upstream looks for a step among the moments; it is loaded with the parameter groups
        set_states(self, parameter, {"step": None, **tensors})

    def load_with_own_steps(self, state) -> None:
        load(self, state)
        for moments in self.optimizer.state.values():
            moments["step"] = moments["step"].clone()

    def init_loader(self, *args, **kwargs) -> None:
        init(self, *args, **{"generator": torch.Generator()} | kwargs)

    torch.utils.data.DataLoader.__init__ = init_loader
    FileSystemWriterAsync.prepare_write_data = prepare_write_data
    DistributedOptimizer.load_state_dict = load_with_own_steps
    DistributedOptimizer._set_main_param_and_optimizer_states = put_states
    DistributedOptimizer.state_dict = state_dict_with_steps
