"""Saving and loading on a CPU.

On a GPU the checkpoint writer's first act is to copy the tensors to the host, and training waits
for that. Here they are on the host already and would be shared: the writer would write what
training makes of them. So they are copied before.

Where a checkpoint is loaded, upstream's distributed optimizer asks PyTorch's Adam for its step
before there is one, takes the step for one of the moments, and has all parameters count the same
one up; Transformer Engine's Adam, as on a GPU, keeps it elsewhere.

Each iterator over a data loader draws a seed from the CPU's random numbers, which are the device's
here: a run that goes on makes its iterators anew, and its dropout would differ. So loaders have
random numbers of their own.
"""


def install() -> None:
    """Copy what is saved when its writing is prepared; give an optimizer that has not stepped a
    state of step 0."""
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
        # which is a tensor of PyTorch's, and put in elsewhere
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
