"""The work of layers that are attention, an MLP or Mamba alone, for one micro-batch.

Of Mamba layers no step has been measured: they are taken to run as fast as other layers' products
and passes do. What the kernels read and write is counted from mamba_ssm's
``ops/triton/ssd_combined.py`` and the files that it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, partial

from harness.experiment.linear_layers import LayerKind
from harness.predict.mamba_operations import CHUNK, channels, states
from harness.predict.network import Group
from harness.predict.work import MicroBatchWork, Work, added, linear_shapes

SHARE = 0.5
"""Host time of a layer that is one thing, relative to one with attention and an MLP; a rough value.
"""
SCAN_BACKWARD = 2.5
"""Bytes and products of a scan's backward pass, relative to its forward pass, which it repeats; a
rough value."""

Part = Callable[[], tuple[Work, Work]]


class PatternWork(MicroBatchWork):
    """The work of a rank for one micro-batch, whether or not the model has a layer_pattern."""

    @cached_property
    def layers(self) -> dict[str, tuple[Work, Work]]:
        """As of any model; by kind where a pattern says what each layer is."""
        if not self.model.layer_pattern:
            return super().layers
        return {
            "mamba": self.mamba_layer(),
            "attention": self.attention_layer(),
            "mlp": self.mlp_layer(),
        }

    def attention_layer(self) -> tuple[Work, Work]:
        """A layer of attention alone, recomputation included."""
        parts = [self.attention, partial(self.moved, self.head_bytes), self.context_parallel]
        again = Work()
        if "core_attn" in self.experiment.selectively_recomputed:
            again = self.attention()[0] + self.context_parallel()[0]
        return self.alone("attention", parts, again)

    def mlp_layer(self) -> tuple[Work, Work]:
        """A layer of an MLP alone, recomputation included."""
        again = Work()
        if "mlp" in self.experiment.selectively_recomputed:
            again = self.mlp_forward(self.model.ffn)
        return self.alone("mlp", [partial(self.moved, self.inner_bytes)], again)

    def mamba_layer(self) -> tuple[Work, Work]:
        """A Mamba layer, recomputation included."""
        return self.alone("mamba", [self.scan, self.exchanged_for_heads], Work())

    def alone(self, kind: LayerKind, parts: Iterable[Part], again: Work) -> tuple[Work, Work]:
        """A norm, the linear layers of ``kind``, these ``parts`` and the sum with the residual.

        Args:
            again: what selective recomputation repeats.
        """
        shapes = list(linear_shapes(self.experiment, kind))
        forward, backward = added(
            *self.launched(self.rates.plain * SHARE),
            [
                self.half_hooks,
                partial(self.multiplied, shapes),
                partial(self.quantized, shapes),
                partial(self.moved, self.norm_bytes),
                *parts,
                self.tensor_parallel_sum,
            ],
        )
        if self.experiment.recompute == "full":
            return forward, backward + forward
        return forward, backward + again

    def half_hooks(self) -> tuple[Work, Work]:
        """Hooks of half as many modules and parameters as a transformer layer has."""
        forward, backward = self.hooks()
        return forward * SHARE, backward * SHARE

    def moved(self, counted: Callable[[], tuple[float, float]]) -> tuple[Work, Work]:
        """The passes over so many bytes."""
        forward, backward = (side / self.bytes_per_s for side in counted())
        return Work(passes=forward), Work(passes=backward)

    def scan(self) -> tuple[Work, Work]:
        """The convolution, the scan in chunks and the norm behind it.

        Forward the convolution reads and writes its channels; states of chunks are written in fp32,
        passed on and written in 16 bits; the scan reads those, its inputs, the gate and the
        products of B and C, and writes its result with and without the gate.
        """
        tokens, inner, conv = channels(self.experiment)
        mamba, held = self.model.mamba, states(self.experiment)
        groups = (conv - inner) / 2 / mamba.state_dim
        of_pairs = tokens * CHUNK * groups
        moved = tokens * (2 * (2 * conv + 2 * conv + inner) + 4 * inner + 4 * inner)
        moved += held * (4 + 4 + 2 + 2) + of_pairs * (4 + 4)
        # states written and read, pairs of tokens of a chunk (half of them later), their inputs
        flops = 4 * held * CHUNK + 2 * of_pairs * mamba.state_dim + tokens * CHUNK * inner
        forward = Work(products=flops / self.flop_per_s, passes=moved / self.bytes_per_s)
        return forward, forward * SCAN_BACKWARD

    def exchanged_for_heads(self) -> tuple[Work, Work]:
        """Context parallel ranks exchange projections of few tokens for some heads of all tokens,
        and the scan's result back (MambaContextParallel in
        megatron/core/ssm/mamba_context_parallel.py)."""
        if self.experiment.cp == 1:
            return Work(), Work()
        group = Group(self.experiment.cp, self.experiment.tp)
        tokens, inner, conv = channels(self.experiment)
        sent = 2 * tokens * (2 * inner + conv)
        work = Work(
            exchange=self.network.all_to_all_s(sent, group),
            passes=2 * sent / self.bytes_per_s,
            launches=self.context_launches_s,
        )
        return work, work
