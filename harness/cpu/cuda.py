"""``torch.cuda`` answered by the CPU: one device whose memory is host memory and whose streams are already done."""

import time
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

GIB = 2**30


class Stream:
    """A stream on which everything has happened: CPU operations are synchronous."""

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
    """A moment on the host's clock."""

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


class CudaIsCpu(TorchFunctionMode):
    """Send every tensor that asks for a CUDA device to the CPU.

    Upstream names devices as ``"cuda"``, ``"cuda:0"``, ``torch.device("cuda")`` or the number that
    ``torch.cuda.current_device()`` gave; all of them pass through here, as an argument of a tensor's method or a factory.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda or function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.to:
            args = (args[0], *(_on_cpu(value) for value in args[1:]))
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        result = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(result, str):  # optimizers check for 'torch.cuda.FloatTensor'
            return result.replace("torch.", "torch.cuda.")
        return True if function is _IS_CUDA else result


_IS_CUDA = torch.Tensor.is_cuda.__get__


def _on_cpu(device: object) -> object:
    """Return the CPU where ``device`` names a CUDA device, else ``device`` as it is."""
    if isinstance(device, bool):
        return device
    names_cuda = isinstance(device, int) or (isinstance(device, str | torch.device) and str(device).startswith("cuda"))
    return "cpu" if names_cuda else device


def install() -> None:
    """Put the stand-in into ``torch``, for this process and the ones it forks."""
    import torch._dynamo  # optimizers import it on first use; it refuses to load once torch.cuda is replaced

    CudaIsCpu().__enter__()
    for name in ("Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double", "Bool"):
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    stream = Stream()
    properties = SimpleNamespace(
        name="CPU", major=8, minor=0, multi_processor_count=1, total_memory=_host_memory_bytes(), uuid=None
    )
    answers = {
        "is_available": lambda: True, "is_initialized": lambda: True, "init": _nothing, "_lazy_init": _nothing,
        "_lazy_call": lambda call, **_: call(), "device_count": lambda: 1, "current_device": lambda: 0,
        "set_device": _nothing, "synchronize": _nothing, "empty_cache": _nothing, "check_error": _nothing,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda *_: (8, 0), "get_device_name": lambda *_: "CPU",
        "get_device_properties": lambda *_: properties, "is_bf16_supported": lambda *_, **__: True,
        "Stream": Stream, "Event": Event, "stream": lambda stream: stream or Stream(), "set_stream": _nothing,
        "current_stream": lambda *_: stream, "default_stream": lambda *_: stream,
        "default_generators": (torch.default_generator,), "manual_seed": torch.default_generator.manual_seed,
        "manual_seed_all": _nothing, "initial_seed": torch.initial_seed,
        "get_rng_state": _get_rng_state, "set_rng_state": _set_rng_state,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.cuda.random.get_rng_state, torch.cuda.random.set_rng_state = _get_rng_state, _set_rng_state
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda *_: 0)
    torch.compile = lambda function=None, **_: function or (lambda f: f)


def _nothing(*args: object, **kwargs: object) -> None: ...


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


def _host_memory_bytes() -> int:
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
