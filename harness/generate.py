"""``make generate``: text from a run's checkpoint or imported weights, by upstream's model in one
process. No torch here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness import ROOT
from harness.data import data_sets
from harness.errors import UserError, nearest
from harness.experiment import command_line
from harness.experiment.constraints import with_changes
from harness.experiment.experiment import Experiment
from harness.run import finding
from harness.run.checkpoints import Checkpoint, Loading
from harness.upstreams.megatron_lm.environment import variables
from harness.upstreams.megatron_lm.flags import (
    Device,
    flags_as_learned,
    loading_flags,
    tokenizer_flags,
)

if TYPE_CHECKING:
    from harness.data.chat.conversations import Render

SETTINGS = ("RUN", "PROMPT", "QUESTION", "TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "SEED")
ASKED = ("PROMPT", "QUESTION", "DATA")
USAGE = 'make generate RUN=label PROMPT="Once upon a time"'

REQUEST_VARIABLE = "HARNESS_GENERATE"
"""Names the folder in which the process finds request.json, and leaves answer.json."""
ONE_PROCESS = {
    "dp": 1,
    "tp": 1,
    "pp": 1,
    "vpp": 1,
    "cp": 1,
    "ep": 1,
    "etp": 1,
    "nodes": 1,
    "sequence_parallel": False,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "sharding": "no_shard",
    "recompute": "none",
    "recompute_modules": (),
    "optimizer": "adam",
    "optimizer_state": "fp32",
    "gradients": "fp32",
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest; top_k and top_p drop the
    unlikely (0: none)."""

    prompt: str
    tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 1234


@dataclass(frozen=True)
class Request:
    """A checkpoint, the experiment it is of, and what to make of it.

    Attributes:
        tokenizer: the folder of the tokenizer that imported weights came with; none for a run,
        which has its data's.
        conversations: the pair, without its ending, of conversations whose answers are compared
        with the model's own.
    """

    checkpoint: Checkpoint
    experiment: Experiment
    sampling: Sampling
    tokenizer: Path | None = None
    conversations: Path | None = None


def parse(settings: Mapping[str, str], outdir: Path) -> Request:
    """What ``make generate`` asks for.

    Raises:
        UserError: a setting is missing or out of range, or there is no such checkpoint of a known
        model.
    """
    _check_words(settings)
    sampling = Sampling(
        prompt=settings.get("PROMPT", ""),
        tokens=command_line.count("TOKENS", settings.get("TOKENS", "64")),
        temperature=command_line.non_negative("TEMPERATURE", settings.get("TEMPERATURE", "1")),
        top_k=command_line.count("TOP_K", settings.get("TOP_K", "0"), least=0),
        top_p=command_line.non_negative("TOP_P", settings.get("TOP_P", "0")),
        seed=command_line.count("SEED", settings.get("SEED", "1234"), least=0),
    )
    if sampling.top_p > 1:
        raise UserError(f"TOP_P={settings['TOP_P']}: expected a probability, 0 to 1")
    if sampling.top_k and sampling.top_p:
        raise UserError("TOP_K= and TOP_P= both drop tokens; give one of them")
    weights = settings.get("WEIGHTS")
    request = (
        _of_weights(weights, sampling) if weights else _of_run(settings["RUN"], outdir, sampling)
    )
    tokenizer = request.tokenizer or _of_its_data(request.experiment)
    if tokenizer is None:
        _check_numbers(sampling.prompt, request)
    if "QUESTION" in settings:
        asked = [{"role": "user", "content": settings["QUESTION"]}]
        return replace(
            request, sampling=replace(sampling, prompt=_template(tokenizer)(asked, True))
        )
    if "DATA" in settings:
        return replace(request, conversations=_conversations(settings["DATA"], request, tokenizer))
    return request


def _check_numbers(prompt: str, request: Request) -> None:
    e, words = request.experiment, prompt.split()
    if not all(
        word.isascii() and word.isdigit() and int(word) < e.model.vocab_size for word in words
    ):
        raise UserError(
            f"PROMPT={prompt}: {request.checkpoint.path.parent} was trained on mock data, whose"
            " tokens are "
            f'numbers below {e.model.vocab_size}: PROMPT="1 2 3"\n'
            f"for text, train on some: make {e.id} DATA=synthetic SAVE=1"
        )


def _check_words(settings: Mapping[str, str]) -> None:
    whose = [key for key in ("RUN", "WEIGHTS") if key in settings]
    asked = [key for key in ASKED if key in settings]
    if missing := ["RUN"] * (not whose) + ["PROMPT"] * (not asked):
        raise UserError(f"{' and '.join(missing)} missing: {USAGE}")
    for given in (whose, asked):
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are given; leave one out: {USAGE}")


def _of_run(wanted: str, outdir: Path, sampling: Sampling) -> Request:
    """The newest whole checkpoint of the run, or in the folder, ``wanted``."""
    found = finding.checkpoint(wanted, outdir, lambda said: print(said, file=sys.stderr))
    experiment = finding.experiment_of(found.path.parent)
    if experiment is None:
        raise UserError(
            f"{found.path.parent}: of which model? there is no experiment.json in it nor above"
            " it\nname a run (make checkpoints lists those that have some), or imported weights:"
            " WEIGHTS="
        )
    if experiment.sharding.startswith("fsdp"):
        raise UserError(
            f"{found.path} is Megatron-FSDP's, which only {experiment.sharding} can load"
        )
    return Request(found, experiment, sampling)


def _of_weights(named: str, sampling: Sampling) -> Request:
    """What ``make import-hf`` left under the name, or in the folder, ``named``."""
    from harness.convert import weights

    imported = weights.find(named)
    if imported is None:
        raise UserError(
            f"WEIGHTS={named}: {nearest(named, weights.names())}\nmake import-hf brings some; RUN="
            " names a run"
        )
    folder, known = imported
    if not known.tokenizer:
        raise UserError(
            f"WEIGHTS={named}: no tokenizer came with them, so that no text can be read or"
            f" written\nput tokenizer.json into {known.source} and import it again (FORCE=1)"
        )
    precision = "bf16" if "bfloat16" in known.dtypes else "fp32"
    experiment = Experiment(
        id="100",
        slug="weights",
        chapter=100,
        shows=known.name,
        model=known.model,
        mbs=1,
        gbs=1,
        seq=known.positions,
        positions=known.positions,
        precision=precision,
    )
    return Request(
        finding.checkpoint(str(folder), folder.parent), experiment, sampling, folder / weights.HF
    )


def _of_its_data(e: Experiment) -> Path | None:
    """The tokenizer of what ``e`` was trained on; none for mock data."""
    return None if e.data == data_sets.MOCK else data_sets.blend(e.data).sets[0].home / "tokenizer"


def _template(tokenizer: Path | None) -> Render:
    """The chat template of the tokenizer. Raises UserError where there is none."""
    from harness.data.chat.conversations import template_of

    if tokenizer is None:
        raise UserError("QUESTION=: this run was trained on no conversations; give PROMPT=")
    return template_of(tokenizer)


def _conversations(name: str, request: Request, tokenizer: Path | None) -> Path:
    """The pair of the data set ``name``: conversations in the tokens that the model knows."""
    from harness.convert.weights import check_data

    chosen = data_sets.find(name)
    if not chosen.chat:
        raise UserError(
            f"DATA={name} is plain text; conversations, whose answers can be compared, come from"
            " make data-chat"
        )
    if tokenizer is None:
        raise UserError(f"DATA={name}: this run was trained on mock data, it knows no text")
    check_data(request.experiment.model, tokenizer, data_sets.blend(name))
    return chosen.prefix


def generate(request: Request, device: Device) -> int:
    """Print the prompt and what follows it; returns the exit status.

    Raises:
        UserError: upstream could not load the checkpoint or run the model; its last lines are in
        the message.
    """
    with tempfile.TemporaryDirectory(prefix="generate-") as name:
        folder = Path(name)
        asked = {
            "sampling": asdict(request.sampling),
            "conversations": request.conversations and str(request.conversations),
        }
        (folder / "request.json").write_text(json.dumps(asked), encoding="utf-8")
        with (folder / "log.txt").open("w") as log:
            status = subprocess.run(
                [sys.executable, "-m", "harness.entry.generate", *_flags(request, device)],
                cwd=ROOT,
                env=_environment(request.experiment, device, folder),
                stdout=log,
                stderr=subprocess.STDOUT,
            ).returncode
        if status:
            lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise UserError(
                errors[0] if errors else "\n".join(["no text was generated:", *lines[-8:]])
            )
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    _tell(request, answer)
    return 0


def _tell(request: Request, answer: Mapping) -> None:
    step, folder = request.checkpoint.step, request.checkpoint.path.parent
    whose = f"step {step} of {folder}" if step else str(folder)
    if request.conversations is None:
        print(answer["text"])
        print(
            f"[{answer['tokens']} tokens after {answer['prompt_tokens']}, {whose}]", file=sys.stderr
        )
        return
    for question, right, said in answer["others"]:
        print(f"{question}\n  is answered: {said!r}\n  in the data: {right!r}")
    name = request.conversations.parent.name
    print(f"{answer['same']} of {answer['answers']} answers are those of {name}, token by token")
    print(f"[{whose}]", file=sys.stderr)


def _flags(request: Request, device: Device) -> list[str]:
    """Upstream's arguments: the run's model on one process, nothing of its optimizer, routing as
    learnt."""
    e = request.experiment
    precision = {"precision": "bf16", "fp8_recipe": None} if e.precision == "fp8" else {}
    alone = with_changes(e, **ONE_PROCESS, **precision)
    untied = ["--untie-embeddings-and-output-weights"] if e.sharding == "torch_fsdp2" else []
    loading = Loading(request.checkpoint.path.parent, request.checkpoint.step, only_weights=True)
    tokenizer = tokenizer_flags(alone.model, request.tokenizer) if request.tokenizer else []
    seed = str(max(request.sampling.seed, 1))
    return [
        *flags_as_learned(alone, device),
        *untied,
        *tokenizer,
        *loading_flags(loading),
        "--skip-train",
        "--seed",
        seed,
    ]


def _environment(e: Experiment, device: Device, folder: Path) -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    one = with_changes(e, **ONE_PROCESS, until=None)
    found = {variable.name: variable.value for variable in variables(one, device)}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), REQUEST_VARIABLE: str(folder)}
    return {**os.environ, **found, **ranks, **meeting}
