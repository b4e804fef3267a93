"""Builds GPTModel and HybridModel for the arguments given, with the same weights; prints how far their losses and gradients are apart.

Started by tests/test_hybrid.py: upstream's groups exist once a process.
"""

import argparse
import json
import sys

from harness.entry import rank

rank.prepare()

import torch  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.training import get_args  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    hybrid_config_from_args,
)
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from megatron.training.models.gpt import GPTModelBuilder  # noqa: E402
from megatron.training.models.hybrid import HybridModelBuilder  # noqa: E402

ATTENTION = ("input_layernorm", "self_attention")


def of_hybrid(name: str) -> str:
    """Where HybridModel has the GPT's weight ``name``: attention and MLP are layers of their own."""
    if name.startswith("decoder.final_layernorm"):
        return name.replace("final_layernorm", "final_norm")
    if not name.startswith("decoder.layers."):
        return name
    _, _, layer, part, *rest = name.split(".")
    number = 2 * int(layer) + (part not in ATTENTION)
    return ".".join(("decoder.layers", str(number), part, *rest))


def main() -> None:
    parse_and_validate_args(args_defaults={"tokenizer_type": "NullTokenizer"})
    initialize_megatron()
    model_parallel_cuda_manual_seed(1)
    groups, args = ProcessGroupCollection.use_mpu_process_groups(), get_args()
    hybrid = HybridModelBuilder(hybrid_config_from_args(args)).build_model(groups)
    layers, args.spec = args.num_layers // 2, None
    plain = argparse.Namespace(**vars(args) | {"num_layers": layers, "hybrid_layer_pattern": None})
    if args.num_experts and "-" in args.hybrid_layer_pattern:
        dense = args.hybrid_layer_pattern.count("-")
        plain.moe_layer_freq = [0] * dense + [1] * (layers - dense)
    gpt = GPTModelBuilder(gpt_config_from_args(plain)).build_model(groups)
    weights = {of_hybrid(name): value for name, value in gpt.state_dict().items()}
    missing, unexpected = hybrid.load_state_dict(weights, strict=False)
    tokens = torch.randint(0, 255, (2, args.seq_length + 1), device="cuda")
    positions = torch.arange(args.seq_length, device="cuda").expand(2, -1)
    mask = torch.ones(2, 1, args.seq_length, args.seq_length, dtype=torch.bool, device="cuda").triu(
        1
    )
    losses, norms = [], []
    for model in (gpt, hybrid):
        loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).float().mean()
        loss.backward()
        losses.append(loss.item())
        norms.append({name: p.grad.norm().item() for name, p in model.named_parameters()})
    apart = max(
        abs(norm - norms[1][of_hybrid(name)]) / max(norm, 1e-12) for name, norm in norms[0].items()
    )
    sizes = [sum(p.numel() for p in model.parameters()) for model in (gpt, hybrid)]
    said = {
        "missing": [name for name in missing if "_extra_state" not in name],
        "unexpected": [name for name in unexpected if "_extra_state" not in name],
        "parameters": sizes,
        "losses": losses,
        "gradients_apart": apart,
    }
    print("\nSAID " + json.dumps(said), file=sys.stderr)


main()
