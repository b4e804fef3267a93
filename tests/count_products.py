"""Run by test_flops.py in a process of its own, where the CPU stands in for CUDA: what PyTorch counts in a step of a tiny model.

Prints, as JSON, the FLOPs of one forward and backward pass for each set of LoRA targets in ``sys.argv``; "-": all weights are trained.
"""

import json
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.experiment.model import Lora
from tests.one_process import initialize

LAYERS, HIDDEN, HEADS, FFN, VOCABULARY, SEQUENCE, BATCH, RANK = 3, 32, 4, 48, 128, 16, 2, 2


def model(lora: Lora | None):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from harness.finetune.lora import attach

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=2,
        ffn_hidden_size=FFN,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    made = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        VOCABULARY,
        SEQUENCE,
        share_embeddings_and_output_weights=False,
    )
    if lora:
        attach([made], lora, 1)
    return made


def flops(targets: str) -> int:
    lora = None if targets == "-" else Lora(rank=RANK, alpha=4.0, targets=tuple(targets.split(",")))
    made = model(lora)
    tokens = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) % VOCABULARY
    mask = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool().view(1, 1, SEQUENCE, SEQUENCE)
    with FlopCounterMode(display=False) as counter:
        made(
            tokens, torch.arange(SEQUENCE).expand(BATCH, SEQUENCE), mask, labels=tokens
        ).sum().backward()
    return counter.get_total_flops()


def main() -> None:
    initialize()
    print(json.dumps({targets: flops(targets) for targets in sys.argv[1:]}))


if __name__ == "__main__":
    main()
