"""A stand-in for ``torch.cuda``: one device with host memory, whose streams are always finished."""

import functools
import time
from collections import defaultdict
from types import SimpleNamespace

import torch


class Stream:
    """A stream that is always finished: CPU operations are synchronous."""

    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: "Stream") -> None: ...

    def wait_event(self, event: "Event") -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record()
        return event

    def query(self) -> bool:
        return True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exception: object) -> None: ...


class Event:
    """A time on the host's clock."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.seconds = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.seconds = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return (end.seconds - self.seconds) * 1e3


FACTORIES = {
    torch: (
        "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like"
        " rand rand_like randint randn randn_like randperm tensor zeros zeros_like"
    ),
    torch.Tensor: "new_empty new_full new_ones new_tensor new_zeros",
}


def _on_cpu(device: object) -> object:
    """The CPU where ``device`` names a CUDA device, else ``device``.

    Upstream names devices as ``"cuda"``, ``"cuda:0"``, ``torch.device("cuda")`` or the number that
    ``torch.cuda.current_device()`` gave.
    """
    number = isinstance(device, int) and not isinstance(device, bool)
    named = isinstance(device, str | torch.device) and str(device).startswith("cuda")
    return "cpu" if number or named else device


def _made_on_cpu(factory):
    """``factory``, with CUDA devices and pinned memory replaced by the CPU."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _patch_tensor(tensor: type = torch.Tensor) -> None:
    """Let a tensor's methods accept CUDA devices and streams, and ``is_cuda`` be true."""
    to, type_ = tensor.to, tensor.type

    def type_or_cast(self, dtype=None, **kwargs):
        if dtype is not None:
            return type_(self, dtype, **kwargs)
        # upstream's optimizers compare with 'torch.cuda.FloatTensor' (optimizer.py)
        return type_(self).replace("torch.", "torch.cuda.")

    tensor.to = _made_on_cpu(lambda self, *args, **kwargs: to(self, *map(_on_cpu, args), **kwargs))
    tensor.type = type_or_cast
    tensor.cuda = tensor.pin_memory = lambda self, *_, **__: self
    tensor.record_stream = lambda self, stream: None
    tensor.is_cuda = True


def install() -> None:
    """Replace ``torch.cuda``, in this process and its forks."""
    # torch.optim imports it on first use, and it cannot be imported once torch.cuda is replaced
    import torch._dynamo

    for owner, names in FACTORIES.items():
        for name in names.split():
            setattr(owner, name, _made_on_cpu(getattr(owner, name)))
    _patch_tensor()
    kinds = "Byte Char Short Int Long Half BFloat16 Float Double Bool"
    for name in kinds.split():
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    for name, answer in _device().items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.Stream, torch.cuda.Event = Stream, Event
    torch.cuda.stream = lambda stream: stream or Stream()
    torch.cuda._lazy_call = lambda call, **_: call()
    torch.cuda.default_generators = (torch.default_generator,)
    torch.cuda.manual_seed = torch.default_generator.manual_seed
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    # compiling takes longer than the few steps of a miniature
    torch.compile = lambda function=None, **_: function or (lambda function: function)


def _device() -> dict[str, object]:
    """Answers of ``torch.cuda``'s functions, for any arguments: a Hopper GPU without memory."""
    stream = Stream()
    nothing = (
        "init _lazy_init set_device set_stream synchronize empty_cache check_error manual_seed_all"
    )
    memory = "memory_allocated max_memory_allocated memory_reserved max_memory_reserved"
    return (
        dict.fromkeys(nothing.split())
        | dict.fromkeys(memory.split(), 0)
        | {
            "is_available": True,
            "is_initialized": True,
            "device_count": 1,
            "current_device": 0,
            "current_stream": stream,
            "default_stream": stream,
            "is_current_stream_capturing": False,
            "is_bf16_supported": True,
            "get_device_name": "CPU",
            "get_device_capability": (9, 0),
            "get_device_properties": SimpleNamespace(
                name="CPU", major=9, minor=0, multi_processor_count=1, total_memory=0
            ),
            "memory_stats": defaultdict(int),
        }
    )
