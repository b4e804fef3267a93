"""What an experiment needs of a machine, besides enough GPUs: units, kernels, packages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from harness.errors import UserError
from harness.experiment.constraints import WITHOUT_MXFP8, without_nvfp4
from harness.experiment.experiment import Experiment
from harness.experiment.hardware import find_card
from harness.machine.gpus import list_gpus
from harness.machine.provenance import package_version

MAMBA_KERNELS = {"causal-conv1d": "1.4.0", "mamba-ssm": "2.0.0"}
"""Packages of Mamba layers on a GPU, and their oldest version for training
(_check_mamba_sequence_packing_support in megatron/core/ssm/mamba_mixer.py); upstream's
pyproject.toml has causal-conv1d ~= 1.5 and a commit after mamba-ssm 2.3.2."""
INSTALL_MAMBA_KERNELS = (
    "pip install --no-build-isolation causal-conv1d~=1.5 mamba-ssm (CUDA's compiler builds them)"
)


def check_machine(experiment: Experiment, device: str) -> None:
    """Raise UserError where this machine lacks what ``experiment`` needs.

    A GPU that hardware.py does not list is taken to have fp8 and fp4.
    """
    kernel = experiment.grouped_gemm
    asks_cards = device == "cuda" and (experiment.quantised or kernel != "streams")
    gpus = list_gpus() if asks_cards else ()
    for card in filter(None, (find_card(gpu.name) for gpu in gpus)):
        if experiment.precision == "fp8" and card.fp8_tflops is None:
            raise UserError(
                f"{experiment.id} computes in fp8, which {card.name} does not support"
                " (Ada, Hopper and later do)\n"
                f"a bf16 row: make list CHAPTER={experiment.chapter}"
            )
        if experiment.fp8_recipe == "mxfp8" and not card.is_blackwell:
            raise UserError(f"{experiment.id}: FP8=mxfp8: {WITHOUT_MXFP8.format(card.name)}")
        if experiment.precision == "fp4" and card.fp4_tflops is None:
            raise UserError(f"{experiment.id}: FP4={experiment.fp4_recipe}: {without_nvfp4(card)}")
        if kernel != "streams" and not card.multiplies_groups(kernel):
            raise UserError(
                f"{experiment.id}: GROUPED_GEMM={kernel} does not run on {card.name}; leave it out"
            )
    if device == "cuda":
        _check_transformer_engine(experiment)
    if experiment.moe_dispatcher == "flex" and device == "cuda" and not find_spec("deep_ep"):
        raise UserError(
            f"{experiment.id}: MOE_DISPATCHER=flex needs the package deep_ep, which is not"
            " installed (https://github.com/deepseek-ai/DeepEP)\n"
            "MOE_DISPATCHER=alltoall does without"
        )
    if experiment.model.mamba and device == "cuda" and (lacking := mamba_kernels_lacking()):
        raise UserError(
            f"{experiment.id}: Mamba layers on a GPU need {' and '.join(lacking)}\n"
            f"{INSTALL_MAMBA_KERNELS}; DEVICE=cpu trains the miniature without them"
        )
    if experiment.optimizer == "muon" and find_spec("emerging_optimizers") is None:
        raise UserError(
            f"{experiment.id}: upstream's muon needs the package emerging-optimizers, which is not"
            " installed\nmake setup installs the pinned version; OPTIMIZER=adam does without it"
        )


def _check_transformer_engine(experiment: Experiment) -> None:
    """Raise UserError where the version that is installed lacks what a setting needs."""
    found = package_version("transformer-engine")
    if found is None:
        return
    for setting, needed in _of_transformer_engine(experiment):
        if _numbers(found) < _numbers(needed):
            raise UserError(
                f"{experiment.id}: {setting} needs Transformer Engine {needed} or later, not"
                f" {found}; make setup-gpu builds a later one, or leave it out"
            )


def _of_transformer_engine(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Settings and the version that upstream asks for.

    Source: ``validate_args`` in megatron/training/arguments.py, TransformerConfig.__post_init__ in
    megatron/core/transformer/transformer_config.py, megatron/core/extensions/transformer_engine.py.
    """
    if experiment.fp4_recipe:
        yield f"FP4={experiment.fp4_recipe}", "2.7"
    if experiment.delay_wgrad:
        yield "DELAY_WGRAD=1", "2.3"
        if not experiment.gradient_fusion:
            yield "DELAY_WGRAD=1 without GRAD_FUSION=1", "2.7"
        if experiment.overlap and experiment.sharding != "no_shard":
            yield f"DELAY_WGRAD=1 with SHARDING={experiment.sharding} and OVERLAP=1", "2.8"
            if experiment.cuda_graphs:
                yield "DELAY_WGRAD=1 with CUDA_GRAPHS and OVERLAP=1", "2.12"
        if experiment.cuda_graphs:
            yield "DELAY_WGRAD=1 with CUDA_GRAPHS", "2.10"


def mamba_kernels_lacking(needed: Mapping[str, str] = MAMBA_KERNELS) -> list[str]:
    """What is wrong with each of the packages ``needed`` that is missing or too old."""
    installed = {name: package_version(name) for name in needed}
    return [
        f"{name} {oldest} or later ({installed[name] or 'not installed'})"
        for name, oldest in needed.items()
        if _numbers(installed[name] or "") < _numbers(oldest)
    ]


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, to compare."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
