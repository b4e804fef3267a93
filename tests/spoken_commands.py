"""Commands that README, docs, help, comments and messages tell a reader to type, with placeholders filled in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from harness import ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(
        path
        for folder in ("docs", "benchmarks", "data")
        for path in sorted((ROOT / folder).glob("*.md"))
    ),
]
SOURCES = sorted((ROOT / "harness").rglob("*.py"))
PLAIN = [
    ROOT / "Makefile",
    ROOT / "experiments" / "targets.mk",
    *sorted((ROOT / "scripts").glob("*.sh")),
    *sorted(path for path in (ROOT / "docker").iterdir() if path.is_file()),
    *sorted((ROOT / "experiments").glob("*.yaml")),
    *sorted((ROOT / "data").glob("*.yaml")),
]

VALUE = r"""(?:"[^"\n]*"|'[^'\n]*'|[^\s\]"'`;)]*)"""
MAKE = re.compile(
    r"(?<![\w./-])make (?P<target>[a-z0-9<{…\x00][^\s`'\",;:)\]|\\]*)(?P<words>(?:[ ]+\[?[A-Z][A-Z0-9_]*="
    + VALUE
    + r"\]?)*)"
)
PROSE = {
    "a",
    "an",
    "any",
    "anew",
    "arguments,",
    "another",
    "each",
    "fit",
    "from",
    "ids",
    "it",
    "its",
    "mends",
    "more",
    "of",
    "one",
    "or",
    "out",
    "room",
    "sample",
    "shingles",
    "something",
    "sure",
    "takes",
    "text",
    "that",
    "the",
    "their",
    "them",
    "these",
    "this",
    "till",
    "two",
    "up",
    "upstream",
    "us",
    "use",
    "when",
    "which",
    "with",
    "your",
    "what",
    "model",
    "models",
    "pip",
    "ready",
    "losses",
    "recipes",
    "they",
    "must",
    "zsh",
    "has",
    "tests",
    "and",
    "runs",
    "starts",
    "installs",
    "by",
    "is",
}
"""Words that follow the English verb."""
FENCE = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)
ROW = re.compile(r"^ +([1-9]\d\dh?): \{", re.MULTILINE)

EXPRESSIONS = {
    "command_of(one.experiment)": "101",
    "command_of(fastest.experiment)": "101",
    "e.id": "101",
    "again": "101",
    "id_": "101",
    "wanted[0].id": "101",
    "planned.full.id": "101",
    "experiments[0].id": "101",
    "experiment.id": "101",
    "found.experiment.id": "101",
    "plan.experiment.id": "101",
    "self.plan.experiment.id": "101",
    "best.experiment.id": "101",
    "row.make or row.id": "101",
    "best.settings": "STEPS=20",
    "layout.settings": "STEPS=20",
    "whole[0]": "DRY_RUN",
    "number": "100",
    "job": "77",
    "jobs[0]": "77",
    "chain[0].job": "77",
    "target": "chapter-100",
    "rows[0].id": "77",
    "e.chapter": "100",
    "card.key": "h100-80gb",
    "machine.gpu": "h100-80gb",
    "experiment[0] if experiment else '<id>'": "101",
    "next(iter(known))": "synthetic",
    "manifest.name": "mine",
    "chosen.name": "synthetic",
    "name": "synthetic",
    "run.label": "label",
    "named": "label",
    "first": "synthetic",
    "traced[1]": "282",
    "e.nodes": "2",
    "known.name": "synthetic",
    "overrides.command_of(e)": "101",
    "overrides.command_of(experiment)": "101",
    "command": "101",
    "self.target": "table",
}
"""What stands for an expression in a message."""
IN_FILE = {
    ("checked.py", "e.id"): "219",
    ("commands.py", "manifest.name"): "toy-chat",
    ("data_sets.py", "name"): "synthetic",
    ("cli.py", "e.id"): "604",
    ("arguments.py", "name"): "gpt2",
    ("merge.py", "name"): "mine",
}
"""The same, where one file means another thing by it."""
VALUES = {
    "RUN": "label",
    "LOAD": "label",
    "WEIGHTS": "label",
    "NAME": "mine",
    "INPUT": "texts",
    "OUT": "folder",
    "HF": "folder",
    "FROM": "a b",
    "DATA": "mine",
    "A": "101",
    "B": "111",
    "PROMPT": "1 2",
    "QUESTION": "why?",
    "TOKENIZER": "gpt2",
    "TP": "2",
    "PP": "2",
    "EP": "2",
    "TOKENS": "8",
    "TEMPERATURE": "0",
    "TOP_K": "3",
    "TOP_P": "0.9",
    "SEED": "1",
    "PYTHON": "python3",
}
"""What stands for ``…``, or for an expression without an entry above, as a value."""
NAMED = {
    "<label>": "label",
    "label-or-id": "label",
    "label-or-folder": "label",
    "<name>": "mine",
    "c4": "mine",
    "<group>": "h200-8gpu",
    "file-or-folder": "texts",
    "folder-or-repository": "folder",
    "name": "mine",
    "label-or-id-or-folder": "label",
    "like-this-one": "folder",
    "folder|gpt2|bytes": "gpt2",
}
"""What stands for a value that describes itself."""


@dataclass(frozen=True)
class Spoken:
    """A command as it is to be typed, and where it stands."""

    words: tuple[str, ...]
    where: str

    @property
    def line(self) -> str:
        return " ".join(("make", *self.words))


def in_text(text: str, where: str, file: str = "") -> Iterator[Spoken]:
    """Every ``make …`` in ``text``: with all optional words, and without them."""
    for found in MAKE.finditer(text):
        target = _target(found["target"], file)
        if target is None:
            continue
        needed = re.sub(r"\[[^]]*\]", "", found["words"])
        for words in dict.fromkeys((found["words"], needed)):
            chosen = [
                (key, value)
                for key, value in re.findall(r"([A-Z][A-Z0-9_]*)=(" + VALUE + ")", words)
                if key != "KEY"
            ]
            yield Spoken(
                (
                    target,
                    *(
                        f"{key}={filled}"
                        for key, value in chosen
                        if (filled := _value(key, value, file))
                    ),
                ),
                where,
            )


def in_pages() -> Iterator[Spoken]:
    """Commands in code blocks and inline code of Markdown, but of rows that a page teaches to add."""
    for page in PAGES:
        text = page.read_text()
        added = set(ROW.findall(text))
        for spoken in in_text(_code(text), page.name):
            if not any(re.search(rf"(^|-){id_}[*]?$", spoken.words[0]) for id_ in added):
                yield spoken


def in_sources() -> Iterator[Spoken]:
    """Commands in the strings of the harness, docstrings included, and in other files' lines."""
    for path in SOURCES:
        for text in _strings(ast.parse(path.read_text())):
            yield from in_text(text, str(path.relative_to(ROOT)), path.name)
    for path in PLAIN:
        for line in path.read_text().splitlines():
            if usage := re.match(r"#([a-z0-9-]+) ## [^ ].*?(?:  (.*))?$", line):
                yield from in_text(
                    f"make {usage[1]} {' '.join(re.findall(r'\[?[A-Z0-9_]+=' + VALUE + r'[^]]*\]?', usage[2] or ''))}",
                    path.name,
                )
            elif setting := re.match(r"#([A-Z0-9_]+)=(.*?) ## ", line):
                yield Spoken(
                    (
                        SETTING_OF.get(setting[1], "101"),
                        f"{setting[1]}={setting[2].strip('"')}",
                        *SETTING_NEEDS.get(setting[1], ()),
                    ),
                    path.name,
                )
            else:
                yield from in_text(line, path.name)


SETTING_OF = {
    "FP8": "611",
    "FP4": "611",
    "VPP": "408",
    "PP": "408",
    **dict.fromkeys(("FIRST_STAGE_LAYERS", "LAST_STAGE_LAYERS", "PP_LAYOUT"), "408"),
    **dict.fromkeys(("EMBEDDING_AS_LAYER", "LOSS_AS_LAYER"), "408"),
    "TP": "211",
    "SP": "212",
    "TP_OVERLAP": "282",
    "MTP": "611",
    "SHARED_EXPERT_OVERLAP": "941",
    **dict.fromkeys(
        (
            "MOE_DISPATCHER",
            "EP_OVERLAP",
            "DELAY_WGRAD",
            "GROUPED_GEMM",
            "MOE_CAPACITY",
            "ROUTER_FUSION",
            "MOE_BACKEND",
        ),
        "502",
    ),
    "CP": "302",
    **dict.fromkeys(("CP_COMM_TYPE", "CP_A2A"), "308"),
    "EP": "502",
    "RECOMPUTE_MODULES": "502",
    "OVERLAP": "128",
    "OPTIM_INSTANCES": "128",
    "FP8_PARAMS": "613",
    "ETP": "502",
    "NODES": "219",
    "NODE_RANK": "219",
    "RENDEZVOUS": "219",
    "GPUS": "128",
    "DP": "128",
    "SHARDING": "128",
    "LORA_ALPHA": "802",
    "LORA_DROPOUT": "802",
    "LORA_TARGETS": "802",
    "PACK": "chapter-100",
    "FORCE": "chapter-100",
    "TIME": "101",
}
"""An experiment that each setting's example in ``make help`` suits; 101 where none is given."""
IN_KUBERNETES = ("K8S=1", "IMAGE=registry.example/megatron-harness:1", "CLAIM=megatron")
SETTING_NEEDS = {
    "MBS": ("GBS=2",),
    "OPTIMIZER_STATE": ("SHARDING=optim",),
    "OFFLOAD": ("SHARDING=optim",),
    "SHARED_EXPERT_OVERLAP": ("EP_OVERLAP=0",),
    "MOE_BACKEND": ("MOE_DISPATCHER=flex",),
    "DELAY_WGRAD": ("EP_OVERLAP=1",),
    "NODE_RANK": ("NODES=2", "RENDEZVOUS=host:29500"),
    "NODES": ("RENDEZVOUS=host:29500",),
    "RENDEZVOUS": ("NODES=2",),
    "PARTITION": ("SLURM=1",),
    "ACCOUNT": ("SLURM=1",),
    "TIME": ("SLURM=1",),
    "QOS": ("SLURM=1",),
    "CONSTRAINT": ("SLURM=1",),
    "EXCLUSIVE": ("SLURM=1",),
    "GRACE": ("SLURM=1",),
    "CHAIN": ("SLURM=1", "SAVE=1"),
    "CLUSTER": ("SLURM=1",),
    "CONTAINER": ("SLURM=1", "IMAGE=image.sqsh"),
    "K8S": IN_KUBERNETES[1:],
    "IMAGE": IN_KUBERNETES,
    "CLAIM": IN_KUBERNETES,
    "NAMESPACE": IN_KUBERNETES,
    "QUEUE": IN_KUBERNETES,
    "RDMA": IN_KUBERNETES,
    "HOST_NETWORK": IN_KUBERNETES,
    "RESTARTS": IN_KUBERNETES,
    "WANDB_PROJECT": ("WANDB=offline",),
    "WANDB_ENTITY": ("WANDB=offline",),
    "WANDB_NAME": ("WANDB=offline",),
    "KEEP": ("SAVE=1",),
    "CROSS_ENTROPY_FUSION": ("DROPOUT=0",),
    "CROSS_ENTROPY_IMPL": ("CROSS_ENTROPY_FUSION=1",),
    "MIN_LR": ("LR=3e-4",),
    "LR_WARMUP": ("LR=3e-4", "STEPS=1000"),
    "ETP": ("EP=4",),
    "CP_A2A": ("CP_COMM_TYPE=a2a+p2p",),
    "EMBEDDING_AS_LAYER": ("ARGS=--num-layers 71",),
    "LOSS_AS_LAYER": ("ARGS=--num-layers 71",),
}
"""What else an example needs, as the help says of it."""


def _code(text: str) -> str:
    """The code of a Markdown page: fenced, indented, inline; comments of a shell cut off."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    lines = [line for block in FENCE.finditer(text) for line in block[0].splitlines()]
    rest = FENCE.sub("", text)
    lines += re.findall(r"^(?: {4,}|\t)(.*)$", rest, re.MULTILINE) + re.findall(
        r"(?<!`)`([^`]+)`(?!`)", rest
    )
    return "\n".join(re.sub(r"\s#\s.*", "", line.replace("\n", " ")) for line in lines)


def _strings(tree: ast.Module) -> Iterator[str]:
    """Every string, of docstrings what is code in them; expressions within one stand between NULs."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    inside = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value
                if isinstance(part, ast.Constant)
                else f"\x00{ast.unparse(part.value).encode().hex()}\x00"
                for part in node.values
            )
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in inside
        ):
            yield (
                "\n".join(re.findall(r"``([^`]+)``", node.value))
                if id(node) in docs
                else node.value
            )


def _target(word: str, file: str) -> str | None:
    """The target that ``word`` means; None where it is English."""
    word = _filled(word.rstrip("."), file)
    if word in PROSE or word.startswith("…"):
        return None
    word = (
        re.sub(r"<tab>$|…$", "*", word)
        .replace("<id>", "101")
        .replace("<name>", "synthetic")
        .replace("chapter-N", "chapter-100")
    )
    return word or None


def _value(key: str, value: str, file: str) -> str:
    value = _filled(value.strip("\"'").rstrip(".,:"), file)
    if value == "":
        return ""
    value = (
        VALUES.get(key, "")
        if value == "…" or "UNKNOWN(" in value
        else NAMED.get(value, value.replace("<name>", "mine"))
    )
    return value.partition("|")[0]


def _filled(text: str, file: str) -> str:
    def fill(found: re.Match[str]) -> str:
        expression = bytes.fromhex(found[1]).decode()
        return (
            IN_FILE.get((file, expression))
            or EXPRESSIONS.get(expression)
            or f"UNKNOWN({expression})"
        )

    return re.sub("\x00([0-9a-f]*)\x00", fill, text)
