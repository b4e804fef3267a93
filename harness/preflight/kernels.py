"""Rates of one GPU: matrix products, experts' grouped products, attention, memory."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache

import torch
import torch.distributed as dist

from harness.predict.machine_file import (
    AttentionRate,
    GroupedRate,
    LinearRate,
    MemoryRates,
    ProductRate,
)
from harness.preflight.clock import Clock

CACHE_BYTES = 128 * 2**20
"""Operands of successive products fill more than the GPU's second-level cache (50 MiB on Hopper),
as those of successive layers do."""
MEMORY_ELEMENTS = 2**28
SMALL_MEMORY_ELEMENTS = 2**22


def products(
    clock: Clock, shapes: Sequence[tuple[int, int, int]], device: str
) -> Iterator[ProductRate]:
    """bf16 products of linear layers, [rows, inner] x [inner, columns], in all three directions.

    Layouts are those of ``torch.nn.functional.linear`` and its backward pass.
    """
    multiply = {
        "forward": lambda value, weight, gradient: torch.mm(value, weight.t()),
        "input_gradient": lambda value, weight, gradient: torch.mm(gradient, weight),
        "weight_gradient": lambda value, weight, gradient: torch.mm(gradient.t(), value),
    }
    for rows, columns, inner in shapes:
        turns = itertools.cycle(_operands(rows, columns, inner, device))
        for direction, product in multiply.items():
            us = clock.device_us(lambda product=product, turns=turns: product(*next(turns)))
            yield ProductRate(direction=direction, rows=rows, columns=columns, inner=inner, us=us)


def _operands(rows: int, columns: int, inner: int, device: str) -> list[tuple[torch.Tensor, ...]]:
    """Inputs, weights and output gradients: so many sets that none is still in the cache.

    Normal random numbers: zeros draw less power, which lets the GPU clock higher.
    """
    one = 2 * (rows * inner + columns * inner + rows * columns)
    number = max(1, min(8, -(-CACHE_BYTES // one)))
    sizes = ((rows, inner), (columns, inner), (rows, columns))
    return [
        tuple(torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes)
        for _ in range(number)
    ]


def sustained_tflops(
    seconds: float, size: int, device: str, clock: Clock, meanwhile: Callable[[], object]
) -> tuple[float, float]:
    """Rate of a product of ``size`` cubed in TFLOP/s over ``seconds``: at first, and at the end.

    Power and temperature limits lower the clock after a second or so. ``meanwhile`` is called
    after the first tenth.
    """
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    calls = 20 if device == "cuda" else 1

    def multiply() -> torch.Tensor:
        return torch.mm(left, right)

    multiply()  # the first one loads cuBLAS
    tenth = max(1, round(seconds / clock.batch_time_s(multiply, calls) / 10))
    first_s = clock.times_s(multiply, calls, tenth)
    meanwhile()
    last_s = clock.times_s(multiply, calls, 9 * tenth)[-tenth:]
    flops = 2 * size**3 * calls
    return flops / min(first_s) / 1e12, flops / statistics.median(last_s) / 1e12


def _both_us(
    time_us: Callable[[Callable[[], object]], float],
    forward: Callable[[], torch.Tensor],
    gradient: torch.Tensor,
) -> tuple[float, float]:
    """Forward and backward pass by ``time_us``; backward is what both take beyond forward."""
    forward_us = time_us(forward)
    both_us = time_us(lambda: forward().backward(gradient))
    return forward_us, both_us - forward_us


def linears(
    clock: Clock, shapes: Sequence[tuple[int, int, int]], recipe: str | None
) -> Iterator[LinearRate]:
    """Transformer Engine's linear layer, forward and backward, by an fp8 recipe (None: bf16).

    Its time includes conversion to fp8. The weights are converted in the first of several
    micro-batches only, as in training.
    """
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    # Delayed scaling reduces the maxima of every module that ever ran, over the group that it ran
    # with; ranks that time themselves do not call equally often.
    FP8GlobalStateManager.reset()
    for rows, columns, inner in shapes:
        layer = te.Linear(inner, columns, bias=False, params_dtype=torch.bfloat16)
        value = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        gradient = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        first = True

        def forward(layer=layer, value=value) -> torch.Tensor:
            nonlocal first
            with _fp8_context(recipe):
                out = layer(value, is_first_microbatch=first if recipe else None)
            first = False
            return out

        forward_us, backward_us = _both_us(clock.device_us, forward, gradient)
        yield LinearRate(
            recipe=recipe,
            rows=rows,
            columns=columns,
            inner=inner,
            forward_us=forward_us,
            backward_us=backward_us,
        )


@cache
def _alone() -> dist.ProcessGroup:
    """A group of this rank alone, over which delayed scaling reduces its maxima."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return groups[dist.get_rank()]


def _fp8_context(recipe: str | None):
    """Transformer Engine's context of an fp8 recipe, as upstream sets it up
    (get_fp8_context in megatron/core/fp8_utils.py)."""
    if recipe is None:
        return nullcontext()
    import transformer_engine.pytorch as te
    from transformer_engine.common import recipe as recipes

    made = {
        "delayed": lambda: recipes.DelayedScaling(amax_history_len=1024, amax_compute_algo="max"),
        "tensorwise": recipes.Float8CurrentScaling,
        "blockwise": recipes.Float8BlockScaling,
    }[recipe]()
    return te.autocast(enabled=True, recipe=made, amax_reduction_group=_alone())


def grouped(clock: Clock, cases: Sequence[tuple[int, int, int, int]]) -> Iterator[GroupedRate]:
    """Experts' grouped products by Transformer Engine, as upstream's TEGroupedLinear calls them.

    Args:
        cases: experts, rows of each, columns, inner size.
    """
    import transformer_engine.pytorch as te

    for experts, rows, columns, inner in cases:
        layer = te.GroupedLinear(experts, inner, columns, bias=False, params_dtype=torch.bfloat16)
        value = torch.randn(
            experts * rows, inner, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        gradient = torch.randn(experts * rows, columns, device="cuda", dtype=torch.bfloat16)
        splits = torch.full((experts,), rows, dtype=torch.int64)

        def forward(layer=layer, value=value, splits=splits) -> torch.Tensor:
            return layer(value, splits, is_first_microbatch=None)

        forward_us, backward_us = _both_us(clock.device_us, forward, gradient)
        forward_launch_us, backward_launch_us = _both_us(clock.launch_us, forward, gradient)
        yield GroupedRate(
            experts=experts,
            rows=rows,
            columns=columns,
            inner=inner,
            forward_us=forward_us,
            backward_us=backward_us,
            forward_launch_us=forward_launch_us,
            backward_launch_us=backward_launch_us,
        )


def attention(
    clock: Clock, cases: Sequence[tuple[int, int, int, int, int, float]], device: str
) -> Iterator[AttentionRate]:
    """Causal attention of one layer, forward and backward.

    Args:
        cases: head size, heads, heads of keys, sequence length, sequences, dropout.
    """
    for head_size, heads, key_heads, length, sequences, dropout in cases:
        queries, keys, values = (
            torch.randn(
                length,
                sequences,
                number,
                head_size,
                device=device,
                dtype=torch.bfloat16,
                requires_grad=True,
            )
            for number in (heads, key_heads, key_heads)
        )
        forward = _attention_call(queries, keys, values, dropout)
        gradient = torch.randn_like(forward())
        forward_us, backward_us = _both_us(clock.device_us, forward, gradient)
        yield AttentionRate(
            head_size=head_size,
            heads=heads,
            key_heads=key_heads,
            length=length,
            sequences=sequences,
            dropout=dropout,
            forward_us=forward_us,
            backward_us=backward_us,
        )


def _attention_call(queries, keys, values, dropout: float) -> Callable[[], torch.Tensor]:
    """Transformer Engine's attention on a GPU, PyTorch's on a CPU."""
    heads, key_heads = queries.shape[2], keys.shape[2]
    if queries.device.type == "cpu":
        q, k, v = (t.permute(1, 2, 0, 3) for t in (queries, keys, values))
        return lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=heads != key_heads
        )
    import transformer_engine.pytorch as te

    module = te.DotProductAttention(
        heads,
        queries.shape[3],
        num_gqa_groups=key_heads,
        attention_dropout=dropout,
        qkv_format="sbhd",
        attn_mask_type="causal",
    )
    out = module(queries, keys, values)
    return lambda: module(queries, keys, values).view(out.shape)


def memory(clock: Clock, device: str) -> MemoryRates:
    """Memory bandwidth in GB/s, reads and writes together, of what lies between the products."""
    elements = MEMORY_ELEMENTS if device == "cuda" else SMALL_MEMORY_ELEMENTS
    source = torch.randn(elements, device=device, dtype=torch.bfloat16)
    target, other = torch.empty_like(source), torch.randn_like(source)
    width = 4096
    rows = source.view(-1, width)
    scale, shift = (torch.randn(width, device=device, dtype=torch.bfloat16) for _ in range(2))
    calls = {
        "copy": (2, lambda: target.copy_(source)),
        "add": (3, lambda: torch.add(source, other, out=target)),
        "norm": (2, lambda: torch.nn.functional.layer_norm(rows, (width,), scale, shift)),
        "gelu": (2, lambda: torch.nn.functional.gelu(source)),
    }
    found = {}
    for name, (passes, call) in calls.items():
        found[name] = passes * 2 * elements / clock.device_us(call) / 1e3
    return MemoryRates(**{f"{name}_gb_per_s": rate for name, rate in found.items()})
