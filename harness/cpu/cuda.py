"""``torch.cuda`` answered by the CPU: one device whose memory is host memory and whose streams are already done."""

import functools
import os
import time
from types import SimpleNamespace

import torch

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


FACTORIES = {
    torch: (
        "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like rand rand_like "
        "randint randn randn_like randperm tensor zeros zeros_like"
    ),
    torch.Tensor: "new_empty new_full new_ones new_tensor new_zeros",
}


def _on_cpu(device: object) -> object:
    """Return the CPU where ``device`` names a CUDA device, else ``device`` as it is.

    Upstream names devices as ``"cuda"``, ``"cuda:0"``, ``torch.device("cuda")`` or the number that
    ``torch.cuda.current_device()`` gave.
    """
    number = isinstance(device, int) and not isinstance(device, bool)
    named = isinstance(device, str | torch.device) and str(device).startswith("cuda")
    return "cpu" if number or named else device


def _made_on_cpu(factory):
    """Return ``factory`` making tensors on the CPU that were wanted on a CUDA device or in pinned memory."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def _mend_tensor(tensor: type = torch.Tensor) -> None:
    """Let a tensor's methods take CUDA devices and streams, and let a tensor say that it is on CUDA."""
    to, type_ = tensor.to, tensor.type

    def type_or_cast(self, dtype=None, **kwargs):
        if dtype is not None:
            return type_(self, dtype, **kwargs)
        return type_(self).replace("torch.", "torch.cuda.")  # optimizers look for 'torch.cuda.FloatTensor'

    tensor.to = _made_on_cpu(lambda self, *args, **kwargs: to(self, *map(_on_cpu, args), **kwargs))
    tensor.type = type_or_cast
    tensor.cuda = tensor.pin_memory = lambda self, *_, **__: self
    tensor.record_stream = lambda self, stream: None
    tensor.is_cuda = True


def install() -> None:
    """Put the stand-in into ``torch``, for this process and the ones it forks."""
    import torch._dynamo  # optimizers import it on first use; it refuses to load once torch.cuda is replaced

    for owner, names in FACTORIES.items():
        for name in names.split():
            setattr(owner, name, _made_on_cpu(getattr(owner, name)))
    _mend_tensor()
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
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
