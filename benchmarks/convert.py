"""Weights of a billion parameters from Hugging Face's files to Megatron-LM's and back: seconds, and
memory beside their size.

    python benchmarks/convert.py FOLDER

Writes benchmarks/convert.json. FOLDER takes 8 GB for a while. The model has Llama 3.2 1B's sizes
and random bf16 weights. Each conversion is a process of its own on two cores, the files being in
the page cache; ``fsync`` is part of it. Memory is the peak of the process's resident pages, less
what it is before the first tensor (Python, PyTorch, upstream's parser).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULTS = Path(__file__).with_suffix(".json")
CORES = 2
REPEATS = 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def main(folder: Path) -> None:
    """Make the model, convert it both ways, and write the results."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    source, imported, exported = folder / "hf", folder / "megatron", folder / "back"
    run("make", source)
    model = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    runs: dict[str, list[dict[str, float]]] = {"import": [], "export": []}
    for _ in range(REPEATS):
        for each in (imported, exported):
            shutil.rmtree(each, ignore_errors=True)
        runs["import"].append(run("import", source, imported))
        runs["export"].append(run("export", imported, exported))
    same = identical(source, exported)
    summary = {
        name: {
            "seconds": sorted(each["seconds"] for each in both)[REPEATS // 2],
            "memory_per_model": max(each["memory_bytes"] for each in both) / model,
            "resident_per_model": max(each["resident_bytes"] for each in both) / model,
        }
        for name, both in runs.items()
    }
    machine = {
        "cpu": cpu(),
        "cores": CORES,
        "system": platform.platform(),
        "load_after": os.getloadavg()[0],
    }
    results = {
        "machine": machine,
        "model_bytes": model,
        "weights_identical": same,
        "runs": runs,
        "summary": summary,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name, figures in summary.items():
        print(
            f"{name}: {figures['seconds']:.1f} s, memory {figures['memory_per_model']:.2f} x the model's {model / 1e9:.2f} GB "
            f"({figures['resident_per_model']:.2f} x with everything that is imported)"
        )
    print(f"weights identical after both ways: {same}; {RESULTS.relative_to(ROOT)} written")
    shutil.rmtree(folder)


def identical(source: Path, exported: Path) -> bool:
    """Whether both folders hold the same tensors, bit by bit."""
    import torch

    from harness.convert.safetensor_files import open_folder

    one, other = open_folder(source), open_folder(exported)
    return {*one} == {*other} and all(
        torch.equal(one.read(name).view(torch.int16), other.read(name).view(torch.int16))
        for name in one
    )


def run(*words: object) -> dict[str, float]:
    """One step in a process of its own, which prints what it took."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *map(str, words)],
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.monotonic() - begun}


def step(what: str, *folders: str) -> None:
    """Make, import or export in this process, and print its memory in bytes."""
    import resource

    source, *target = map(Path, folders)
    if what == "make":
        make(source)
        before = 0
    else:
        before = everything_imported(what)
        convert(what, source, target[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"memory_bytes": peak - before, "resident_bytes": peak}))


def everything_imported(what: str) -> int:
    """Import what a conversion imports; return the resident bytes then."""
    import psutil
    import transformers.models.auto.configuration_auto
    from tokenizers import Tokenizer  # noqa: F401

    from harness.convert import arguments, exporting, importing  # noqa: F401

    transformers.AutoConfig.for_model("llama")
    arguments.register_safe_globals()
    return psutil.Process().memory_info().rss


def convert(what: str, source: Path, target: Path) -> None:
    from harness.convert.exporting import export_checkpoint
    from harness.convert.importing import import_folder

    if what == "import":
        import_folder(str(source), target)
    else:
        export_checkpoint(source, target)


def make(folder: Path) -> None:
    """A Hugging Face folder with random weights."""
    import torch

    from harness.convert.architectures import ARCHITECTURES
    from harness.convert.safetensor_files import writing
    from harness.convert.transforms import Sizes

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        **CONFIG,
    }
    (folder / "config.json").write_text(json.dumps(config))
    llama = ARCHITECTURES["LlamaForCausalLM"]
    model, positions = llama.read(config, "benchmark")
    sizes = Sizes(model, positions, model.vocab_size)
    shapes = {}
    for row in llama.rows_of(model):
        parts = row.how.split(torch.empty(sizes.shape(row.shape), device="meta"), sizes)
        for layer in range(model.num_layers) if row.stacked(sizes) else (None,):
            for name, part in zip(row.names(() if layer is None else (layer,)), parts, strict=True):
                shapes[name] = torch.bfloat16, tuple(part.shape)
    with writing(folder, dict(sorted(shapes.items()))) as writer:
        for name, (dtype, shape) in shapes.items():
            writer.write(name, torch.randn(shape, dtype=dtype))


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make" | "import" | "export" as what, *folders]:
            step(what, *folders)
        case [folder]:
            main(Path(folder).resolve())
        case _:
            sys.exit(__doc__)
