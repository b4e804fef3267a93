"""Models of Hugging Face's that are small enough to make in a test: random weights, every bias and norm among them."""

from pathlib import Path

VOCABULARY = 200
_LLAMA = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
_GPT2 = {
    "n_layer": 4,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}

MODELS = {
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt2-untied": ("GPT2LMHeadModel", {**_GPT2, "tie_word_embeddings": False, "n_inner": 96}),
    "llama": ("LlamaForCausalLM", {**_LLAMA, "head_dim": 16, "rope_parameters": _ROPE3}),
    "llama-tied": (
        "LlamaForCausalLM",
        {**_LLAMA, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    ),
    "olmoe": ("OlmoeForCausalLM", {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "GptOssForCausalLM",
        {
            **_LLAMA,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "rope_parameters": _YARN,
        },
    ),
}


def make(name: str, folder: Path, dtype: str = "float32", shard_size: str = "5GB"):
    """Write the model ``name`` into ``folder`` and return it."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    kind, settings = MODELS[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(sum(name.encode()))
    config = model_class.config_class(**settings)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    return model
