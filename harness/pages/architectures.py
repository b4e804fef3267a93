"""Markdown of which tensors and settings of a Hugging Face model correspond to Megatron-LM's."""

from __future__ import annotations

from harness.convert.architectures import ARCHITECTURES, LAYERS, Architecture
from harness.evidence.markdown import table


def page(name: str) -> str:
    """The tables of tensors and of settings for the architecture ``name``."""
    return f"{_tensors(ARCHITECTURES[name])}\n\n{_settings(ARCHITECTURES[name])}"


def _tensors(architecture: Architecture) -> str:
    """Each tensor of Megatron-LM, without ``decoder.layers.``, and what it is made from."""
    lines = [
        (
            _code(row.megatron.removeprefix(LAYERS)),
            " x ".join(row.shape),
            ", ".join(map(_code, row.hf)),
            row.how.says,
        )
        for row in architecture.rows
    ]
    return table(("Megatron-LM", "shape", "Hugging Face", "how"), lines, "llll")


def _settings(architecture: Architecture) -> str:
    """Each key of config.json: its counterpart in models.yaml, or the values it may have."""
    lines = [(_code(setting.key), setting.says) for setting in architecture.settings]
    lines += [
        (_code(key), "must be " + " or ".join(_code(repr(value)) for value in known))
        for key, known in architecture.needs.items()
    ]
    return table(("config.json", "here"), lines, "ll")


def _code(text: str) -> str:
    return f"`{text}`"
