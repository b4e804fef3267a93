"""``make generate``: sample text from a checkpoint or imported weights, in a process of its own."""

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

INPUTS = ("PROMPT", "QUESTION", "DATA")
USAGE = 'make generate RUN=label PROMPT="Once upon a time"'

REQUEST_VARIABLE = "HARNESS_GENERATE"
"""Names the folder in which the process finds request.json, and leaves answer.json."""
_ONES = ("dp", "tp", "pp", "vpp", "cp", "ep", "etp", "nodes", "micro_batch_size")
ONE_PROCESS = dict.fromkeys((*_ONES, "global_batch_size"), 1) | {
    "sequence_parallel": False,
    "sharding": "no_shard",
    "recompute": "none",
    "recompute_modules": (),
    "optimizer": "adam",
    "optimizer_state": "fp32",
    "gradients": "fp32",
    "entry": "gpt",
}
"""Fields of an experiment that runs in one process and does not train."""


@dataclass(frozen=True)
class Sampling:
    """How text is continued.

    Attributes:
        tokens: how many follow the prompt, at most.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: only so many of the most likely tokens are drawn from; 0: all.
        top_p: only the most likely tokens that together have this probability are drawn from; 0:
        all.
    """

    prompt: str
    tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 1234


@dataclass(frozen=True)
class Request:
    """A checkpoint, and what to make of it.

    Attributes:
        experiment: the one that it was trained as.
        tokenizer: the folder of the tokenizer that imported weights came with; None for a run,
        which has that of its data.
        conversations: path, without suffix, of a data set whose answers are compared with the
        model's own.
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
    _check_settings(settings)
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
    if "WEIGHTS" in settings:
        request = _of_weights(settings["WEIGHTS"], sampling)
    else:
        request = _of_run(settings["RUN"], outdir, sampling)
    if request.experiment.model.mamba:
        raise UserError(
            f"{request.experiment.id}: make generate runs GPTModel, which has no Mamba layers; its"
            " validation loss says how well the model predicts"
        )
    tokenizer = request.tokenizer or _tokenizer_of_data(request.experiment)
    if tokenizer is None:
        _check_numbers(sampling.prompt, request)
    if "QUESTION" in settings:
        turns = [{"role": "user", "content": settings["QUESTION"]}]
        prompt = _template(tokenizer)(turns, True)
        return replace(request, sampling=replace(sampling, prompt=prompt))
    if "DATA" in settings:
        return replace(request, conversations=_conversations(settings["DATA"], request, tokenizer))
    return request


def generate(request: Request, device: Device) -> int:
    """Print the prompt and its continuation. Returns the exit status.

    Raises:
        UserError: upstream could not load the checkpoint or run the model; the message has its
        last lines.
    """
    with tempfile.TemporaryDirectory(prefix="generate-") as name:
        folder = Path(name)
        asked = {
            "sampling": asdict(request.sampling),
            "conversations": request.conversations and str(request.conversations),
        }
        (folder / "request.json").write_text(json.dumps(asked), encoding="utf-8")
        log_path = folder / "log.txt"
        with log_path.open("w") as log:
            status = subprocess.run(
                [sys.executable, "-m", "harness.entry.generate", *_flags(request, device)],
                cwd=ROOT,
                env=_environment(request.experiment, device, folder),
                stdout=log,
                stderr=subprocess.STDOUT,
            ).returncode
        if status:
            lines = log_path.read_text(errors="replace").strip().splitlines()
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise UserError(
                errors[0] if errors else "\n".join(["no text was generated:", *lines[-8:]])
            )
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    _print(request, answer)
    return 0


def _check_settings(settings: Mapping[str, str]) -> None:
    """Raise UserError unless there is one checkpoint, and one input for the model."""
    checkpoints = [key for key in ("RUN", "WEIGHTS") if key in settings]
    inputs = [key for key in INPUTS if key in settings]
    if missing := ["RUN"] * (not checkpoints) + ["PROMPT"] * (not inputs):
        raise UserError(f"{' and '.join(missing)} missing: {USAGE}")
    for given in (checkpoints, inputs):
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} are given; leave one out: {USAGE}")


def _check_numbers(prompt: str, request: Request) -> None:
    """Raise UserError unless ``prompt`` is token ids: a model of mock data knows no text."""
    experiment = request.experiment
    vocabulary = experiment.model.vocab_size
    ids = prompt.split()
    if not all(word.isascii() and word.isdigit() and int(word) < vocabulary for word in ids):
        raise UserError(
            f"PROMPT={prompt}: {request.checkpoint.path.parent} was trained on mock data, whose"
            f' tokens are numbers below {vocabulary}: PROMPT="1 2 3"\n'
            f"for text, train on some: make {experiment.id} DATA=synthetic SAVE=1"
        )


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
        precision="bf16" if "bfloat16" in known.dtypes else "fp32",
    )
    found = finding.checkpoint(str(folder), folder.parent)
    return Request(found, experiment, sampling, folder / weights.HF)


def _tokenizer_of_data(experiment: Experiment) -> Path | None:
    """The tokenizer of what ``experiment`` was trained on; None for mock data."""
    if experiment.data == data_sets.MOCK:
        return None
    return data_sets.blend(experiment.data).sets[0].home / "tokenizer"


def _template(tokenizer: Path | None) -> Render:
    """The chat template of the tokenizer. Raises UserError where there is none."""
    from harness.data.chat.conversations import template_of

    if tokenizer is None:
        raise UserError("QUESTION=: this run was trained on no conversations; give PROMPT=")
    return template_of(tokenizer)


def _conversations(name: str, request: Request, tokenizer: Path | None) -> Path:
    """The path, without suffix, of the data set ``name``: conversations in the model's tokens."""
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


def _print(request: Request, answer: Mapping) -> None:
    """Print the text on stdout, and where it is from on stderr."""
    step, folder = request.checkpoint.step, request.checkpoint.path.parent
    origin = f"step {step} of {folder}" if step else str(folder)
    if request.conversations is None:
        print(answer["text"])
        print(
            f"[{answer['tokens']} tokens after {answer['prompt_tokens']}, {origin}]",
            file=sys.stderr,
        )
        return
    for question, right, said in answer["others"]:
        print(f"{question}\n  is answered: {said!r}\n  in the data: {right!r}")
    name = request.conversations.parent.name
    print(f"{answer['same']} of {answer['answers']} answers are those of {name}, token by token")
    print(f"[{origin}]", file=sys.stderr)


def _flags(request: Request, device: Device) -> list[str]:
    """Upstream's arguments: the run's model in one process, nothing of its optimizer, routing as
    learned."""
    experiment = request.experiment
    fields = dict(ONE_PROCESS)
    if experiment.quantised:
        fields |= {"precision": "bf16", "fp8_recipe": None, "fp4_recipe": None}
    alone = with_changes(experiment, **fields)
    # A run with FSDP2 has untied embeddings, whatever its model says (see flags.py).
    untied = experiment.sharding == "torch_fsdp2"
    path = request.checkpoint.path
    loading = Loading(path.parent, request.checkpoint.step, only_weights=True)
    return [
        *flags_as_learned(alone, device),
        *(["--untie-embeddings-and-output-weights"] if untied else []),
        *(tokenizer_flags(alone.model, request.tokenizer) if request.tokenizer else []),
        *loading_flags(loading),
        "--skip-train",
        "--seed",
        str(max(request.sampling.seed, 1)),
    ]


def _environment(experiment: Experiment, device: Device, folder: Path) -> dict[str, str]:
    """The environment of the only rank of a process group of one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    alone = with_changes(experiment, **ONE_PROCESS, until=None)
    return {
        **os.environ,
        **{variable.name: variable.value for variable in variables(alone, device)},
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        REQUEST_VARIABLE: str(folder),
    }
