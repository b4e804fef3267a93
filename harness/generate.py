"""``make generate``: text from a checkpoint, by upstream's model in one process. Needs no torch itself."""

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

from harness import ROOT
from harness.checkpoints import Checkpoint, Loading
from harness.data import prepared
from harness.errors import UserError
from harness.experiment import overrides
from harness.experiment.catalog import Experiment
from harness.megatron.environment import variables
from harness.megatron.flags import Device, loading_flags, megatron_flags
from harness.planning import resume

SETTINGS = ("RUN", "PROMPT", "QUESTION", "TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "SEED")
REQUEST_VARIABLE = "HARNESS_GENERATE"
"""Names the folder in which the process finds request.json, and leaves answer.json."""
ONE_PROCESS = {"dp": 1, "tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": 1, "nodes": 1, "sequence_parallel": False,
               "micro_batch_size": 1, "global_batch_size": 1, "sharding": "no_shard", "recompute": "none",
               "recompute_modules": (), "optimizer": "adam", "optimizer_state": "fp32", "gradients": "fp32"}


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest; top_k and top_p drop the unlikely (0: none)."""

    prompt: str
    tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 1234


@dataclass(frozen=True)
class Request:
    """A checkpoint, the experiment it is of, and what to make of it."""

    checkpoint: Checkpoint
    experiment: Experiment
    sampling: Sampling


def parse(settings: Mapping[str, str], outdir: Path) -> Request:
    """What ``make generate`` asks for.

    Raises:
        UserError: RUN or PROMPT is missing, a value is out of range, or there is no such checkpoint of a known model.
    """
    asked = "PROMPT" if "PROMPT" in settings or "QUESTION" not in settings else "QUESTION"
    if missing := [key for key in ("RUN", asked) if key not in settings]:
        raise UserError(f'{" and ".join(missing)} missing: make generate RUN=label PROMPT="Once upon a time"')
    sampling = Sampling(
        prompt=settings[asked],
        tokens=overrides.count("TOKENS", settings.get("TOKENS", "64")),
        temperature=overrides.rate("TEMPERATURE", settings.get("TEMPERATURE", "1")),
        top_k=overrides.count("TOP_K", settings.get("TOP_K", "0"), least=0),
        top_p=overrides.rate("TOP_P", settings.get("TOP_P", "0")),
        seed=overrides.count("SEED", settings.get("SEED", "1234"), least=0),
    )
    if sampling.top_p > 1:
        raise UserError(f"TOP_P={settings['TOP_P']}: expected a probability, 0 to 1")
    if sampling.top_k and sampling.top_p:
        raise UserError("TOP_K= and TOP_P= both drop tokens; give one of them")
    found = resume.find(settings["RUN"], outdir, lambda said: print(said, file=sys.stderr))
    experiment = resume.experiment_of(found.path.parent)
    if experiment is None:
        raise UserError(f"{found.path.parent}: of which model? there is no experiment.json in it nor above it\n"
                        "name a run: make checkpoints lists those that have some")
    if experiment.sharding.startswith("fsdp"):
        raise UserError(f"{found.path} is Megatron-FSDP's, which only {experiment.sharding} can load")
    if asked == "QUESTION":
        sampling = replace(sampling, prompt=_in_template(sampling.prompt, experiment))
    return Request(found, experiment, sampling)


def _in_template(question: str, e: Experiment) -> str:
    """The question as the chat template of the run's tokenizer puts it. Raises UserError where there is none."""
    from harness.data.chat.conversations import template_of

    if e.data == prepared.MOCK:
        raise UserError("QUESTION=: this run was trained on no conversations; give PROMPT=")
    return template_of(prepared.blend(e.data).sets[0].home / "tokenizer")([{"role": "user", "content": question}], True)


def generate(request: Request, device: Device) -> int:
    """Print the prompt and what follows it; returns the exit status.

    Raises:
        UserError: upstream could not load the checkpoint or run the model; its last lines are in the message.
    """
    with tempfile.TemporaryDirectory(prefix="generate-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(asdict(request.sampling)), encoding="utf-8")
        with (folder / "log.txt").open("w") as log:
            status = subprocess.run(
                [sys.executable, "-m", "harness.entry.generate", *_flags(request, device)],
                cwd=ROOT, env=_environment(request.experiment, device, folder), stdout=log, stderr=subprocess.STDOUT,
            ).returncode  # fmt: skip
        if status:
            lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise UserError(errors[0] if errors else "\n".join(["no text was generated:", *lines[-8:]]))
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    print(answer["text"])
    step = request.checkpoint.step
    print(f"[{answer['tokens']} tokens after {answer['prompt_tokens']}, step {step} of {request.checkpoint.path.parent}]",
          file=sys.stderr)
    return 0


def _flags(request: Request, device: Device) -> list[str]:
    """Upstream's arguments: the run's model on one process, nothing of its optimizer, routing as learnt."""
    e = request.experiment
    precision = {"precision": "bf16", "fp8_recipe": None} if e.precision == "fp8" else {}
    alone = e.with_changes(**ONE_PROCESS, **precision)
    forced = "--moe-router-force-load-balancing"
    words = [word for group in megatron_flags(alone, device) for word in group if word != forced]
    untied = ["--untie-embeddings-and-output-weights"] if e.sharding == "torch_fsdp2" else []
    loading = Loading(request.checkpoint.path.parent, request.checkpoint.step, only_weights=True)
    return [*words, *untied, *loading_flags(loading), "--skip-train", "--seed", str(max(request.sampling.seed, 1))]


def _environment(e: Experiment, device: Device, folder: Path) -> dict[str, str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    one = e.with_changes(**ONE_PROCESS, until=None)
    found = {variable.name: variable.value for variable in variables(one, device)}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), REQUEST_VARIABLE: str(folder)}
    return {**os.environ, **found, **ranks, **meeting}
