"""A small model, conversations for it, and runs that fine-tune the one on the other."""

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.data.chat.byte_tokenizer import byte_folder
from harness.data.chat.prepare import Skipped, prepare_chat
from harness.data.data_sets import prefix_of
from harness.data.manifest import Manifest
from harness.data.tokenizer import find_tokenizer
from harness.experiment.experiment import Experiment
from harness.experiment.model import Lora
from harness.machine.upstream import locate, put_on_path
from harness.run.directory import RUN_DIR_VARIABLE, RunDir
from harness.upstreams.megatron_lm.environment import variables
from harness.upstreams.megatron_lm.flags import megatron_flags

ROOT = Path(__file__).resolve().parent.parent
READ = [sys.executable, str(ROOT / "tests" / "read_chat.py")]
SEQUENCE = 64
ROWS = 512
"""Of the vocabulary: what it is padded to under tp 1 and 2 alike, so that losses compare."""
STEPS = 4
LORA = Lora(rank=4, alpha=8.0)
TRAINING = [
    "--lr",
    "1e-2",
    "--min-lr",
    "1e-2",
    "--lr-decay-style",
    "constant",
    "--lr-warmup-fraction",
    "0",
    "--eval-iters",
    "0",
]


def conversation(*texts: str, system: str | None = None) -> dict:
    """Question, answer, question, answer."""
    turns = [
        {"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)
    ]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


def write_lines(path: Path, lines) -> Path:
    """A file of JSON Lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@cache
def _examined() -> TemporaryDirectory:
    """The byte tokenizer and what is found out about it, which takes seconds; until the tests end."""
    folder = TemporaryDirectory()
    find_tokenizer(str(byte_folder(Path(folder.name))), Path(folder.name))
    return folder


def prepare(folder: Path, lines: Path, tokenizer: str = "bytes") -> tuple[Manifest, Skipped]:
    """The conversations in ``lines`` as the data set ``chat`` in ``folder``."""
    shutil.copytree(_examined().name, folder / "tokenizers", dirs_exist_ok=True)
    return prepare_chat("chat", lines, tokenizer, folder=folder)


def make_data(folder: Path, number: int = 12) -> Path:
    """Prepare short conversations as the data set ``chat`` in ``folder``; path of its pair."""
    put_on_path(locate())  # before transformers imports what it finds of Megatron-LM
    lines = [
        conversation(f"{n}+{n}?", f"{2 * n}.", *(["and?", "no"] if n % 3 == 0 else []))
        for n in range(number)
    ]
    prepare(folder, write_lines(folder / "chat.jsonl", lines))
    return prefix_of("chat", folder)


def make_hf(folder: Path, kind: str = "gpt2"):
    """Write a tiny GPT-2 or Llama of Hugging Face's for bytes into ``folder``; returns it."""
    import torch
    import transformers

    torch.manual_seed(1)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"))
    if kind == "gpt2":
        config = transformers.GPT2Config(
            n_layer=2,
            n_embd=32,
            n_head=4,
            n_positions=SEQUENCE,
            vocab_size=ROWS,
            initializer_range=0.2,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **ends,
        )
        model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            vocab_size=ROWS,
            max_position_embeddings=SEQUENCE,
            initializer_range=0.2,
            tie_word_embeddings=False,
            **ends,
        )
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    model.float().save_pretrained(folder)
    return model


def make_weights(folder: Path, kind: str = "gpt2"):
    """The model and the experiment that starts from it: Hugging Face's in ``folder``/hf, imported in ``folder``/weights."""
    from harness.convert.importing import import_folder

    model = make_hf(folder / "hf", kind)
    imported = import_folder(str(folder / "hf"), folder / "weights")
    e = Experiment(
        id="999",
        slug="tuned",
        chapter=900,
        shows="x",
        model=imported.model,
        mbs=2,
        gbs=4,
        seq=SEQUENCE,
        steps=STEPS,
        precision="fp32",
        weights=str(folder / "weights"),
        positions=imported.positions,
        lora=LORA,
    )
    return model, e


def tune(
    e: Experiment,
    data: Path,
    run_dir: Path,
    *arguments: str,
    script: tuple[str, ...] = ("-m", "harness.entry"),
) -> RunDir:
    """Train ``e`` on the conversations in ``data`` and wait for it."""
    run_dir.mkdir(parents=True)
    RunDir(run_dir).freeze_experiment(e, "cpu", None)
    words = [word for group in megatron_flags(e, "cpu") for word in group]
    at = words.index("--mock-data")
    end = words.index("--split")
    words[at:end] = [
        "--data-path",
        str(data),
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(data.parent / "tokenizer"),
        "--sft",
        "--no-create-attention-mask-in-dataloader",
        "--calculate-per-token-loss",
        "--data-cache-path",
        str(data.parent / "cache"),
        "--make-vocab-size-divisible-by",
        str(ROWS // e.tp),
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={e.world_size}",
        *script,
    ]
    settings = {variable.name: variable.value for variable in variables(e, "cpu")} | {
        RUN_DIR_VARIABLE: str(run_dir)
    }
    with (run_dir / "logs.txt").open("w") as log:
        status = subprocess.run(
            [*command, *words, *TRAINING, "--split", "1", *arguments],
            cwd=ROOT,
            env=os.environ | settings | {"HF_HUB_OFFLINE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
    assert status == 0, (run_dir / "logs.txt").read_text()[-4000:]
    return RunDir(run_dir)


def losses(run: RunDir) -> list[float]:
    return [step.loss for step in run.read_metrics()]


def adapters(run: RunDir) -> dict:
    """Its adapters, by name."""
    from safetensors.torch import load_file

    return load_file(run.path / "adapters" / "adapters.safetensors")
