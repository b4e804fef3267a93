"""Imported weights in weights/<name>/, which ``make import-hf`` writes and ``--load`` reads.

weights.json                       the model, its source, and upstream's arguments for it
latest_checkpointed_iteration.txt  upstream's tracker; ``release`` means weights only, iteration 0
release/                           the torch_dist checkpoint, loadable under any TP, PP and EP
hf/                                config.json and the tokenizer, unchanged
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from harness import ROOT
from harness.data.data_sets import Blend
from harness.errors import UserError
from harness.experiment.model import Model
from harness.system.files import expanded

_TRAINING = (
    "name",
    "dropout",
    "init_method_std",
    "moe_aux_loss_coeff",
    "moe_router_load_balancing_type",
    "mtp_loss_scaling_factor",
    "moe_z_loss_coeff",
    "ffn_hidden_size",
    "num_query_groups",
    "kv_channels",
    "moe_ffn_hidden_size",
)
"""Fields of a model that its weights do not depend on, or that can say the same in two ways."""
WEIGHTS = ROOT / "weights"
RECORD, RELEASE, HF = "weights.json", "release", "hf"


class Weights(BaseModel):
    """The content of weights.json.

    Attributes:
        source: HF= as given.
        positions: maximum sequence length.
        padded_vocab_size: rows of the vocabulary with padding; upstream reads as many as it needs.
        dequantized: number of tensors converted from MXFP4 to bf16.
        flags: upstream's arguments for the model, without --seq-length.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    source: str
    architecture: str
    model: Model
    positions: int
    padded_vocab_size: int
    parameters: int
    bytes: int
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...]
    dequantized: int
    tokenizer: bool
    flags: tuple[str, ...]


def names() -> list[str]:
    """Names of the imported weights."""
    return sorted(path.parent.name for path in WEIGHTS.glob(f"*/{RECORD}"))


def read(folder: Path) -> Weights | None:
    """The record of imported weights in ``folder``; None if there are none.

    Raises:
        UserError: it is damaged.
    """
    try:
        return Weights.model_validate_json((folder / RECORD).read_bytes(), strict=False)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        raise UserError(
            f"{folder / RECORD} is damaged: {error.errors()[0]['msg']}\nimport it again"
        ) from None


def find(named: str) -> tuple[Path, Weights] | None:
    """The imported weights of ``WEIGHTS=named``: a name in weights/, or a folder (``./name``).

    Returns:
        Their folder and record; None if there are none.

    Raises:
        UserError: they are damaged.
    """
    for folder in ([WEIGHTS / named] if "/" not in named else []) + [expanded(named)]:
        if known := read(folder):
            return folder.resolve(), known
    return None


def differences(trained: Model, model: Model) -> dict[str, tuple[object, object]]:
    """Why ``model`` cannot use the weights of ``trained``: field -> both values.

    Fields that matter only in training (dropout, initial weights, router losses) may differ.
    """
    widths = ("query_size", "key_size", "ffn", *(["moe_ffn"] if trained.num_experts else []))
    names = (*widths, *(name for name in Model.model_fields if name not in _TRAINING))
    both = {name: (getattr(trained, name), getattr(model, name)) for name in names}
    return {name: (there, here) for name, (there, here) in both.items() if there != here}


def check_data(model: Model, tokenizer: Path | None, blend: Blend) -> None:
    """Refuse data whose tokenizer differs from ``model``'s, in the folder ``tokenizer``.

    If the latter is unknown (None), only the vocabulary sizes are compared.

    Raises:
        UserError: an id is a different token in the two, or is outside the model's vocabulary.
    """
    from harness.convert.hub import vocabulary_of

    data = blend.sets[0]
    again = (
        "prepare it again with"
        f" TOKENIZER={tokenizer or 'the folder of the tokenizer of the weights'}"
    )
    if data.vocab_size and data.vocab_size > model.vocab_size:
        raise UserError(
            f"DATA={data.name} has a vocabulary of {data.vocab_size:,} tokens, {model.name} of"
            f" {model.vocab_size:,}\n{again}"
        )
    ours = vocabulary_of(tokenizer) if tokenizer else None
    theirs = (
        vocabulary_of(data.tokenizer_model)
        if data.tokenizer_model and data.tokenizer_model.is_dir()
        else None
    )
    if ours is None or theirs is None:
        return
    if differing := [token for token, number in theirs.items() if ours.get(token) != number]:
        first = min(differing, key=theirs.__getitem__)
        pair = f"{first!r}: {theirs[first]} in the data, {ours.get(first)} in the weights"
        raise UserError(
            f"DATA={data.name} was made by another tokenizer than {model.name}'s:"
            f" {len(differing):,} of {len(theirs):,} tokens have other ids, such as {pair}\n{again}"
        )
