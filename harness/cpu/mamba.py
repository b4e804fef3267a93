"""Mamba-2 layers in plain torch: what upstream's MambaMixer imports from the package mamba_ssm.

That package's kernels need CUDA. The names, arguments and shapes here are those of its
``ops/triton/ssd_combined.py`` and ``ops/triton/layernorm_gated.py``, as far as
megatron/core/ssm/mamba_mixer.py uses them in training. Like the kernels, sums are in fp32 and
results in the inputs' type.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from harness.errors import UserError


def install() -> None:
    """Let upstream's MambaMixer train: it is imported here, while this stands in for mamba_ssm.

    Where that package is installed, its kernels are not used on a CPU either.
    """
    ours = _packages()
    installed = {name: sys.modules[name] for name in ours if name in sys.modules}
    sys.modules.update(ours)
    mixer = import_module("megatron.core.ssm.mamba_mixer")
    for name in ours:
        del sys.modules[name]
    sys.modules.update(installed)
    # its kernel, where it is installed, is for CUDA; without, upstream uses torch's convolution
    mixer.causal_conv1d_fn = None


def chunked_scan(
    inputs: Tensor, decays: Tensor, written: Tensor, read: Tensor, chunk: int
) -> Tensor:
    """What a linear recurrence with a matrix as state puts out, by products of matrices.

    For each head, state_t = exp(decays_t) state_{t-1} + inputs_t written_t^T, from a state of zero,
    and the output is state_t read_t. Within a chunk, token i sees token j by
    exp(decays_{j+1} + … + decays_i) read_i · written_j; what a chunk leaves in the state goes from
    chunk to chunk.

    Source: Dao and Gu 2024 (arXiv:2405.21060), section 6 and listing 1.

    Args:
        inputs: [batch, length, heads, head]
        decays: logarithms of the factors, [batch, length, heads]
        written, read: B and C in the paper, [batch, length, groups, state]; consecutive heads share
            a group
        chunk: tokens of a chunk

    Returns:
        [batch, length, heads, head]
    """
    batch, length, heads, _ = inputs.shape
    chunk = min(chunk, length)
    inputs, decays, written, read = (
        _in_chunks(tensor, chunk) for tensor in (inputs, decays, written, read)
    )
    written, read = (
        tensor.repeat_interleave(heads // tensor.shape[3], dim=3) for tensor in (written, read)
    )
    reached = decays.cumsum(2)  # [batch, chunks, chunk, heads]
    between = reached[:, :, :, None] - reached[:, :, None]
    later = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)
    seen = between.masked_fill(later[:, :, None], -torch.inf).exp()
    scores = torch.einsum("bcihn,bcjhn->bcijh", read, written) * seen
    within = torch.einsum("bcijh,bcjhp->bcihp", scores, inputs)

    whole = reached[:, :, -1]
    left = (whole[:, :, None] - reached).exp()
    added = torch.einsum("bcjhn,bcjh,bcjhp->bchpn", written, left, inputs)
    state, before = torch.zeros_like(added[:, 0]), []
    for index in range(added.shape[1]):
        before.append(state)
        state = whole[:, index].exp()[..., None, None] * state + added[:, index]
    states = torch.stack(before, 1)
    across = torch.einsum("bcihn,bchpn,bcih->bcihp", read, states, reached.exp())
    return (within + across).flatten(1, 2)[:, :length].reshape(batch, length, heads, -1)


def _in_chunks(tensor: Tensor, chunk: int) -> Tensor:
    """[batch, length, …] as [batch, chunks, chunk, …]; zeros behind it change nothing."""
    missing = -tensor.shape[1] % chunk
    padded = functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
    return padded.unflatten(1, (-1, chunk))


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    **others: object,
) -> Tensor:
    """The state space of a Mamba-2 layer: x, z [batch, length, heads, head], dt [batch, length,
    heads], A and D [heads] or D [heads, head], B, C [batch, length, groups, state].

    Raises:
        UserError: an option of inference, or of packed sequences.
    """
    _refuse(others)
    steps = dt.float() + (0 if dt_bias is None else dt_bias.float())
    steps = functional.softplus(steps) if dt_softplus else steps
    inputs = x.float()
    result = chunked_scan(
        inputs * steps[..., None], steps * A.float(), B.float(), C.float(), chunk_size
    )
    if D is not None:
        result = result + inputs * (D if D.dim() == 2 else D[:, None]).float()
    if z is not None:
        result = result * functional.silu(z.float())
    return result.to(x.dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    **others: object,
) -> Tensor:
    """Convolution and state space of a Mamba-2 layer, between its two projections.

    ``zxbcdt`` [batch, length, gate + convolution's input + heads]; the result is as wide as the
    gate. ``norm_before_gate`` is about a norm that upstream applies itself.

    Raises:
        UserError: another activation, an option of inference, or of packed sequences.
    """
    _refuse(others | ({"activation": activation} if activation != "silu" else {}))
    heads, channels = len(A), len(conv1d_weight)
    head = headdim or D.shape[-1]
    gate, convolved, steps = zxbcdt.split([heads * head, channels, heads], dim=-1)
    width = conv1d_weight.shape[1]
    convolved = functional.conv1d(
        functional.pad(convolved.transpose(1, 2), (width - 1, 0)),
        conv1d_weight[:, None],
        conv1d_bias,
        groups=channels,
    )
    convolved = functional.silu(convolved.float()).to(zxbcdt.dtype).transpose(1, 2)
    state = (channels - heads * head) // ngroups // 2
    x, written, read = convolved.split([heads * head, ngroups * state, ngroups * state], dim=-1)
    scanned = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, head)),
        steps,
        A,
        written.unflatten(-1, (ngroups, state)),
        read.unflatten(-1, (ngroups, state)),
        chunk_size,
        D,
        z=gate.unflatten(-1, (heads, head)),
        dt_bias=dt_bias,
        dt_softplus=True,
    )
    return scanned.flatten(-2)


class RMSNorm(torch.nn.Module):
    """An RMS norm over groups of channels, before or after a gate."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        **factory: object,
    ) -> None:
        """
        Args:
            factory: device and type of the weight.
        """
        super().__init__()
        self.eps, self.norm_before_gate = eps, norm_before_gate
        self.group_size = group_size or hidden_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **factory))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Normalise x [..., hidden_size], gated by z of the same shape."""
        values, gate = x.float(), 1.0 if z is None else functional.silu(z.float())
        if not self.norm_before_gate:
            values = values * gate
        groups = values.unflatten(-1, (-1, self.group_size))
        squares = groups.square().mean(-1, keepdim=True)
        normed = (groups * torch.rsqrt(squares + self.eps)).flatten(-2) * self.weight.float()
        return (normed * gate if self.norm_before_gate else normed).to(x.dtype)


def _refuse(options: dict[str, object]) -> None:
    if given := [
        name for name, value in options.items() if value is not None and value is not False
    ]:
        raise UserError(f"CPU: Mamba layers have no {', '.join(given)}; run on a GPU")


def _packages() -> dict[str, ModuleType]:
    """What ``import mamba_ssm…`` finds while this stands in for the package."""
    root, scan, norm = "mamba_ssm.ops.triton", "ssd_combined", "layernorm_gated"
    names = ("mamba_ssm", "mamba_ssm.ops", root, f"{root}.{scan}", f"{root}.{norm}")
    modules = {name: ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
    for function in (mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined):
        setattr(modules[f"{root}.{scan}"], function.__name__, function)
    modules[f"{root}.{norm}"].RMSNorm = RMSNorm
    return modules
