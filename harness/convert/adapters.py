"""Exports LoRA's adapters: merged into the weights, or in PEFT's format.

Merging: W + alpha / r B A, summed in fp32 and rounded once to the weight's own precision.

PEFT has an adapter for each linear layer of Hugging Face; upstream fuses some of these layers. The
adapter of a fused layer becomes one of each part, with all of A and the part's rows of B. That is
exact. The reverse is not, since PEFT's adapters of the parts have different A.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from torch import Tensor

from harness.convert import arguments, torch_dist
from harness.convert.architectures import EMBEDDING, LAYERS, TensorRow, architecture_of
from harness.convert.folders import complete_folder
from harness.convert.torch_dist import TorchDistCheckpoint
from harness.convert.transforms import FUSED_QKV, TRANSPOSED, Sizes
from harness.errors import UserError
from harness.finetune.adapters import KEY, PARENTS, TENSORS, Adapters, read_record
from harness.system.files import write_json

_FAN_IN_FAN_OUT = (FUSED_QKV, TRANSPOSED)
"""Transforms of weights that Hugging Face stores as [in, out]."""


class Factors:
    """The adapters that a run saved in a folder.

    Raises:
        UserError: there are none, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        record = read_record(folder)
        if record is None:
            raise UserError(f"{folder} has no adapters")
        self.record: Adapters = record
        self.folder = folder
        try:
            self._tensors = load_file(folder / TENSORS)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / TENSORS} is damaged: {error}") from None

    def of(self, key: str, index: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] of upstream's weight ``key``, layer ``index``; None without."""
        for name, parent in PARENTS.items():
            if key == f"{LAYERS}{parent}.{name}.weight":
                a, b = (
                    KEY.format(layer=index[0], parent=parent, name=name, factor=factor)
                    for factor in ("lora_A", "lora_B")
                )
                return (self._tensors[a], self._tensors[b]) if a in self._tensors else None
        return None


class Merged(TorchDistCheckpoint):
    """A checkpoint whose weights are read with the adapters merged into them."""

    def __init__(self, folder: Path, factors: Factors) -> None:
        super().__init__(folder)
        self._factors = factors

    def read(self, key: str, index: tuple[int, ...] = ()) -> Tensor:
        """As ``TorchDistCheckpoint.read``.

        Raises:
            UserError: the adapters belong to weights of another shape.
        """
        weight = super().read(key, index)
        if (pair := self._factors.of(key, index)) is None:
            return weight
        a, b = (factor.float() for factor in pair)
        if weight.shape != (len(b), a.shape[1]):
            raise UserError(
                f"{self._factors.folder}: adapters for {len(b)} x {a.shape[1]}, but {key} in"
                f" {self.folder} is {' x '.join(map(str, weight.shape))}: they belong to other"
                " weights"
            )
        return (weight.float() + self._factors.record.lora.scale * (b @ a)).to(weight.dtype)


def export_peft(adapters: Path, base: Path, target: Path, named: str) -> int:
    """Write the adapters in a folder in PEFT's format to ``target``, completely or not at all.

    Args:
        base: the checkpoint that they were trained on.
        named: its name in adapter_config.json: a folder or repository of Hugging Face's.

    Returns:
        The number of parameters.

    Raises:
        UserError: adapters or checkpoint are missing or damaged, or no architecture of Hugging Face
            has such layers.
    """
    from safetensors.torch import save_file

    factors = Factors(adapters)
    arguments.register_safe_globals()
    checkpoint = TorchDistCheckpoint(torch_dist.latest(base))
    args: Namespace = checkpoint.common().get("args") or Namespace()
    rows = checkpoint.shapes[EMBEDDING][0]
    model, positions = arguments.model_of(args, base.name, rows)
    sizes = Sizes(model, positions, rows)
    tensors: dict[str, Tensor] = {}
    targets: dict[str, bool] = {}
    for row in architecture_of(model).rows_of(model):
        for index in row.places(sizes):
            if pair := factors.of(row.megatron, index):
                tensors |= _as_peft(row, index, pair, sizes)
                layers = [name.rpartition("{layer}.")[2].removesuffix(".weight") for name in row.hf]
                targets |= dict.fromkeys(layers, row.how in _FAN_IN_FAN_OUT)
    lora = factors.record.lora
    with complete_folder(target) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": named,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": sorted(targets),
            "fan_in_fan_out": any(targets.values()),
            "bias": "none",
            "inference_mode": True,
        }
        write_json(folder / "adapter_config.json", config)
    return sum(tensor.numel() for tensor in tensors.values())


def _as_peft(
    row: TensorRow, index: tuple[int, ...], pair: tuple[Tensor, Tensor], sizes: Sizes
) -> dict[str, Tensor]:
    """PEFT's tensors for the layers of Hugging Face that ``row`` fuses."""
    a, b = pair
    parts = row.how.split(b, sizes)
    parts = [part.t() for part in parts] if row.how in _FAN_IN_FAN_OUT else parts
    named = [f"base_model.model.{name.removesuffix('.weight')}" for name in row.names(index)]
    return {f"{name}.lora_A.weight": a.clone() for name in named} | {
        f"{name}.lora_B.weight": part.contiguous().clone()
        for name, part in zip(named, parts, strict=True)
    }
