"""The tables of ``architectures`` as Markdown, for docs/weights.md."""

from __future__ import annotations

from harness.convert.architectures import ARCHITECTURES, LAYERS, Architecture
from harness.evidence.markdown import table


def tensors(architecture: Architecture) -> str:
    """Megatron-LM's tensors, without ``decoder.layers.``, and what each is made of."""
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


def settings(architecture: Architecture) -> str:
    """Keys of config.json, and what they are in models.yaml or must be."""
    lines = [(_code(setting.key), setting.says) for setting in architecture.settings]
    lines += [
        (_code(key), "must be " + " or ".join(_code(repr(value)) for value in known))
        for key, known in architecture.needs.items()
    ]
    return table(("config.json", "here"), lines, "ll")


def page(name: str) -> str:
    """Both tables of the architecture ``name``."""
    return f"{tensors(ARCHITECTURES[name])}\n\n{settings(ARCHITECTURES[name])}"


def _code(text: str) -> str:
    return f"`{text}`"
