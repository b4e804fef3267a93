"""Hugging Face weights in and out: nothing is lost on the way, and what cannot be converted is refused."""

import json
import re
import shutil
import sys
import weakref
from pathlib import Path

import pytest

from harness.errors import UserError
from harness.experiment.catalog import load_catalog

sys.path.insert(0, str(Path(__file__).parent))
import tiny_hf

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> a folder of Hugging Face's with that model; read only."""
    made = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            tiny_hf.make(name, made[name])
        return made[name]

    return folder


@pytest.fixture
def llama(folders, tmp_path):
    """A folder with a Llama, to be spoilt."""
    return shutil.copytree(folders("llama"), tmp_path / "llama")


def imported(folder: Path, target: Path, **layout):
    from harness.convert.importing import import_folder

    return import_folder(str(folder), target, **layout)


def exported(folder: Path, target: Path, **options) -> dict:
    from safetensors.torch import load_file

    from harness.convert.exporting import export_checkpoint

    export_checkpoint(folder, target, **options)
    return {
        name: tensor
        for path in target.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def loaded(folder: Path) -> dict:
    from safetensors.torch import load_file

    return {
        name: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change) -> None:
    from safetensors.torch import save_file

    tensors = loaded(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", tiny_hf.MODELS)
def test_there_and_back_is_the_same_bit_by_bit(name, dtype, tmp_path):
    import torch

    tiny_hf.make(name, tmp_path / "hf", dtype)
    weights = imported(tmp_path / "hf", tmp_path / "megatron")
    before, after = loaded(tmp_path / "hf"), exported(tmp_path / "megatron", tmp_path / "back")
    assert before.keys() == after.keys()
    whole = torch.int32 if dtype == "float32" else torch.int16
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor.view(whole), after[key].view(whole)), key
    assert weights.parameters == sum(tensor.numel() for tensor in before.values())
    assert json.loads((tmp_path / "hf/config.json").read_text()) == json.loads(
        (tmp_path / "back/config.json").read_text()
    )


def test_transformers_opens_what_was_exported_in_several_files(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    model = tiny_hf.make("gpt-oss", tmp_path / "hf", shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    imported(tmp_path / "hf", tmp_path / "megatron")
    exported(tmp_path / "megatron", tmp_path / "back", shard_bytes=60_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    tokens = torch.arange(60).view(2, 30)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_files_of_the_base_model_and_their_buffers(folders, tmp_path):
    """GPT-2's own files name no ``transformer.`` and hold the causal mask."""
    import torch

    bare = shutil.copytree(folders("gpt2"), tmp_path / "bare")

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)

    edit_weights(bare, strip)
    imported(bare, tmp_path / "megatron")
    after, whole = exported(tmp_path / "megatron", tmp_path / "back"), loaded(folders("gpt2"))
    assert (
        all(torch.equal(after[name], whole[name]) for name in whole)
        and after.keys() == whole.keys()
    )


def test_mxfp4_experts_become_bf16(folders, tmp_path):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed = shutil.copytree(folders("gpt-oss"), tmp_path / "packed")
    torch.manual_seed(1)
    expected = {}

    def pack(tensors):
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(100, 140, (experts, rows, columns // 32), dtype=torch.uint8)
            tensors[name + "_blocks"], tensors[name + "_scales"] = blocks, scales
            expected[name] = convert_moe_packed_tensors(blocks, scales)

    edit_weights(packed, pack)
    edit_config(
        packed, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    )
    weights = imported(packed, tmp_path / "megatron")
    assert weights.dequantized == len(expected) == 8 and "bfloat16" in weights.dtypes
    after = exported(tmp_path / "megatron", tmp_path / "back")
    assert all(
        torch.equal(after[name].contiguous(), expected[name].contiguous()) for name in expected
    )
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


def test_rows_added_to_a_vocabulary_hardly_change_the_loss(folders, tmp_path):
    """The bound that transforms.padded states, on logits far below zero, where rows of zeros would outweigh the rest."""
    import torch

    from harness.convert.transforms import padded

    torch.manual_seed(2)
    tokens, hidden = torch.randn(100, 16), torch.randn(1000, 16)
    tokens[:, 0] = -40  # every logit is far below zero
    hidden[:, 0] = hidden[:, 0].abs() + 1
    before, zeros = (hidden @ rows.T for rows in (tokens, torch.cat([tokens, torch.zeros(28, 16)])))
    change = (hidden @ padded(tokens, 128).T).logsumexp(-1) - before.logsumexp(-1)
    assert change.min() >= 0 and change.max() < torch.tensor(1.28).log()
    assert (zeros.logsumexp(-1) - before.logsumexp(-1)).min() > 10
    assert (
        imported(folders("gpt2"), tmp_path / "megatron", tp=2).padded_vocab_size == 1024
    )  # enough for TP up to 8


def test_tensors_are_written_one_after_another(tmp_path):
    import torch

    from harness.convert import torch_dist

    alive, most = weakref.WeakSet(), 0

    def make():
        nonlocal most
        tensor = torch.ones(64, 64)
        alive.add(tensor)
        most = max(most, len(alive))
        return tensor

    pieces = [
        torch_dist.Piece("w", (n,), (64, 64), (100,), torch.float32, make) for n in range(100)
    ]
    torch_dist.write(tmp_path / "release", pieces, {})
    assert torch_dist.TorchDistCheckpoint(tmp_path / "release").read("w", (7,)).sum() == 64 * 64
    assert most <= 3 * torch_dist.WRITERS


def test_upstreams_arguments_say_every_model_of_the_catalogue():
    from harness.convert.arguments import flags, model_of, parse

    models = {e.model.name: e.model for e in load_catalog().experiments}
    for model in models.values():
        if model.attention_output_gate or model.latent_attention or model.mamba:
            continue  # of no supported architecture
        args = parse(flags(model, 128))
        again, positions = model_of(args, model.name, model.vocab_size)
        training = dict.fromkeys(("moe_aux_loss_coeff", "moe_z_loss_coeff"))
        assert again.model_copy(update=training) == model.model_copy(update=training)
        assert positions == 128


# As published (Hugging Face: meta-llama/Meta-Llama-3-8B, openai/gpt-oss-20b, allenai/OLMoE-1B-7B-0924), in the keys of their time.
_PUBLISHED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
PUBLISHED = {
    "llama3-8b": {
        **_PUBLISHED,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 500000.0,
        "attention_bias": False,
    },
    "gpt-oss-20b": {
        **_PUBLISHED,
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "max_position_embeddings": 131072,
        "initial_context_length": 4096,
        "vocab_size": 201088,
        "rms_norm_eps": 1e-05,
        "rope_theta": 150000,
        "sliding_window": 128,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "swiglu_limit": 7.0,
        "router_aux_loss_coef": 0.9,
        "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
    },
    "olmoe-1b-7b": {
        **_PUBLISHED,
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
        "vocab_size": 50304,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "clip_qkv": None,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
        "attention_bias": False,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_catalogues_models(name, tmp_path):
    from harness.convert.hub import read_config
    from harness.convert.weights import differences

    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    architecture, config = read_config(tmp_path)
    model, positions = architecture.read(config, name)
    known = next(e.model for e in load_catalog().experiments if e.model.name == name)
    assert differences(known, model) == {}
    assert positions == PUBLISHED[name]["max_position_embeddings"]
    assert (model.dropout, model.init_method_std) == (known.dropout, known.init_method_std)


def test_the_hub(folders, tmp_path, monkeypatch):
    """What it is asked for, and its refusal; nothing is fetched."""
    import huggingface_hub

    from harness.convert import hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *args, **kwargs: asked.append((args, kwargs)) or str(tmp_path),
    )
    assert hub.locate("someone/model@v2") == tmp_path
    assert (
        asked[0][0] == ("someone/model",)
        and asked[0][1]["revision"] == "v2"
        and "*.bin" not in asked[0][1]["allow_patterns"]
    )

    def refuse(*args, **kwargs):
        raise OSError("401 Client Error\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        UserError,
        match="the hub does not give it: 401 Client Error\ncheck the name; a gated model needs HF_TOKEN",
    ):
        hub.locate("someone/model")


def test_what_weights_fit(folders, tmp_path):
    from harness.convert.weights import differences

    model = imported(folders("gpt2"), tmp_path / "gpt2").model
    assert (
        differences(
            model,
            model.model_copy(
                update={"dropout": 0.0, "init_method_std": 0.5, "ffn_hidden_size": 128}
            ),
        )
        == {}
    )
    assert differences(
        model, model.model_copy(update={"num_layers": 5, "ffn_hidden_size": 64})
    ) == {"num_layers": (4, 5), "ffn": (128, 64)}


REFUSED = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "refused"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "damaged"),
    "wrong architecture": (
        lambda f: edit_config(f, architectures=["BertForMaskedLM"]),
        "supported are GPT2LMHeadModel, LlamaForCausalLM",
    ),
    "another size": (
        lambda f: edit_config(f, intermediate_size=96),
        "mlp.gate_proj.weight is [64, 32], not [96, 32]",
    ),
    "more layers": (
        lambda f: edit_config(f, num_hidden_layers=5),
        "tensors are missing:\nmodel.layers.4",
    ),
    "fewer layers": (
        lambda f: edit_config(f, num_hidden_layers=3),
        "are not known:\nmodel.layers.3",
    ),
    "architectures no list": (lambda f: edit_config(f, architectures=5), "damaged"),
    "odd groups": (
        lambda f: edit_config(f, num_key_value_heads=3),
        "num_attention_heads (4) must be divisible by num_query_groups (3)",
    ),
    "odd activation": (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act is 'gelu'"),
    "odd positions": (
        lambda f: edit_config(
            f, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
        ),
        "rope_parameters",
    ),
    **{
        f"{key} {value}": (
            lambda f, given={key: value}: edit_config(f, rope_parameters=tiny_hf._ROPE3 | given),
            f"cannot do {key} {value};",
        )
        for key, value in {
            "low_freq_factor": 2.0,
            "high_freq_factor": 8.0,
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.5,
            "attention_factor": 2.0,
        }.items()
    },
    "no number": (lambda f: edit_config(f, num_hidden_layers="four"), "num_hidden_layers"),
    "cut off": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-100]
        ),
        "is damaged or cut off",
    ),
    "two output layers": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        "lm_head.weight differs from model.embed_tokens.weight in 200 of 200 rows",
    ),
    "too long": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes() + b"x"
        ),
        "is damaged or cut off",
    ),
    "no safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"PK" * 500),
        "is damaged or cut off",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged or cut off"),
    "two dtypes": (
        lambda f: edit_weights(
            f,
            lambda t: t.update(
                {
                    "model.layers.0.self_attn.q_proj.weight": t[
                        "model.layers.0.self_attn.q_proj.weight"
                    ].half()
                }
            ),
        ),
        "different dtypes",
    ),
    "quantised": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised by gptq",
    ),
    "whole numbers": (
        lambda f: edit_weights(
            f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].char()})
        ),
        "model.norm.weight is torch.int8: quantised",
    ),
    "another's tokenizer": (lambda f: tokenizer(f, 300), "the tokenizer has ids up to 299"),
    "damaged tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "tokenizer.json is damaged",
    ),
}


def tokenizer(folder: Path, size: int, first: str = "t") -> None:
    from tokenizers import Tokenizer, models

    folder.mkdir(exist_ok=True)
    Tokenizer(
        models.WordLevel({f"{first}{n}": n for n in range(size)}, unk_token=f"{first}0")
    ).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused_leaves_nothing(fault, llama, tmp_path):
    spoil, says = REFUSED[fault]
    spoil(llama)
    with pytest.raises(UserError) as refused:
        imported(llama, tmp_path / "out" / "llama")
    assert says in str(refused.value), str(refused.value)
    assert not any((tmp_path / "out").glob("*"))


def test_a_tensor_is_written_whole_however_little_the_system_takes_at_once(tmp_path, monkeypatch):
    import torch

    from harness.convert import safetensor_files

    tensors = {
        "a": torch.arange(15, dtype=torch.int32).view(5, 3),
        "the other": torch.arange(4, dtype=torch.float16),
    }
    pwrite = safetensor_files.os.pwrite
    with safetensor_files.writing(
        tmp_path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    ) as writer:
        monkeypatch.setattr(
            safetensor_files.os,
            "pwrite",
            lambda handle, data, offset: pwrite(handle, data[:7], offset),
        )
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    found, header = loaded(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert int.from_bytes(header[:8], "little") % 8 == 0, "aligned, as the format wants it"


@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
def test_tied_embeddings_and_an_output_layer_that_is_the_embedding(name, folders, tmp_path):
    """Some files hold both; where they are equal one is enough, where they are not one would be lost."""
    hf = shutil.copytree(folders(name), tmp_path / "hf")
    embedding = next(
        key for key in loaded(hf) if key.endswith(("wte.weight", "embed_tokens.weight"))
    )
    edit_weights(hf, lambda tensors: tensors.update({"lm_head.weight": tensors[embedding].clone()}))
    assert not imported(hf, tmp_path / "equal").model.untie_embeddings
    edit_weights(hf, lambda tensors: tensors["lm_head.weight"][7].add_(1))
    with pytest.raises(
        UserError,
        match=f"lm_head.weight differs from {embedding} in 1 of .* rows\n.*tie_word_embeddings",
    ):
        imported(hf, tmp_path / "other")
    edit_config(hf, tie_word_embeddings=False)
    assert imported(hf, tmp_path / "both").model.untie_embeddings


def test_missing_shards(tmp_path):
    tiny_hf.make("llama", tmp_path / "hf", shard_size="60KB")
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(UserError, match=f"1 of {len(shards)} shards are missing: {shards[1].name}"):
        imported(tmp_path / "hf", tmp_path / "megatron")


def in_header(shard, pattern, by):
    shard.write_bytes(re.sub(pattern, by, shard.read_bytes(), count=1))


BROKEN_SHARDS = {
    "a shard is cut off": (
        lambda f, shard, index: shard.write_bytes(shard.read_bytes()[:-50]),
        "is damaged or cut off",
    ),
    "a shard goes on": (
        lambda f, shard, index: shard.write_bytes(shard.read_bytes() + b"x"),
        "is damaged or cut off",
    ),
    "a shard has no header": (
        lambda f, shard, index: shard.write_bytes(bytes(50)),
        "is damaged or cut off",
    ),
    "a tensor of an unknown kind": (
        lambda f, shard, index: in_header(shard, rb'"dtype":"F32"', b'"dtype":"U32"'),
        "dtype U32; known: F32",
    ),
    "a tensor of another shape": (
        lambda f, shard, index: in_header(shard, rb'("shape":\[)\d', rb"\g<1>9"),
        "is damaged or cut off",
    ),
    "a shard is a folder": (
        lambda f, shard, index: (shard.unlink(), shard.mkdir()),
        "1 of 5 shards are missing",
    ),
    "the index is damaged": (
        lambda f, shard, index: index.write_text("{"),
        "index.json is damaged",
    ),
    "the index names no files": (
        lambda f, shard, index: index.write_text('{"weight_map": {"a": "b", "c": 1}}'),
        "index.json is damaged",
    ),
    "the index names pickles": (
        lambda f, shard, index: index.write_text('{"weight_map": {"a": "pytorch_model.bin"}}'),
        "shards are missing",
    ),
    "the index is gone": (
        lambda f, shard, index: index.unlink(),
        "has no model.safetensors and no model.safetensors.index.json",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_SHARDS)
def test_broken_shards_are_refused(fault, tmp_path):
    spoil, says = BROKEN_SHARDS[fault]
    tiny_hf.make("llama", tmp_path / "hf", shard_size="60KB")
    spoil(
        tmp_path / "hf",
        sorted((tmp_path / "hf").glob("*.safetensors"))[1],
        tmp_path / "hf" / "model.safetensors.index.json",
    )
    with pytest.raises(UserError, match=says):
        imported(tmp_path / "hf", tmp_path / "out" / "megatron")
    assert not any((tmp_path / "out").glob("*"))


def test_a_layout_that_does_not_divide(llama, tmp_path):
    with pytest.raises(UserError, match=r"num_attention_heads \(4\) must be divisible by TP \(3\)"):
        imported(llama, tmp_path / "out", tp=3)


def test_data_of_another_tokenizer(llama, tmp_path):
    from harness.convert.weights import check_data
    from harness.data.data_sets import Blend, DataSet

    def data(folder):
        return Blend(
            (DataSet("mine", folder / "x", "HuggingFaceTokenizer", folder, 150, "", 1, 1, 1, ""),)
        )

    model = imported(llama, tmp_path / "weights").model
    tokenizer(llama, 200)
    tokenizer(tmp_path / "same", 150)
    tokenizer(tmp_path / "other", 150, first="u")
    check_data(model, llama, data(tmp_path / "same"))
    with pytest.raises(
        UserError,
        match="another tokenizer than weights's: 150 of 150 tokens have other ids, such as 'u0'",
    ):
        check_data(model, llama, data(tmp_path / "other"))
    larger = Blend((DataSet("mine", tmp_path, "NullTokenizer", None, 500, "", 1, 1, 1, ""),))
    with pytest.raises(UserError, match="500 tokens, weights of 200"):
        check_data(model, llama, larger)


def test_tokenizer_and_token_ids_come_back(folders, tmp_path):
    hf = shutil.copytree(folders("llama"), tmp_path / "hf")
    tokenizer(hf, 200)
    edit_config(hf, bos_token_id=7)
    assert imported(hf, tmp_path / "megatron").tokenizer
    exported(tmp_path / "megatron", tmp_path / "back")
    assert (tmp_path / "back/tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "back/config.json").read_text())["bos_token_id"] == 7


DAMAGED = {
    "no metadata": (
        lambda f: (f / "release/.metadata").unlink(),
        "no checkpoint, or an interrupted save",
    ),
    "damaged metadata": (lambda f: (f / "release/.metadata").write_bytes(b"x"), "is damaged"),
    "a file lacks": (lambda f: (f / "release/__0_1.distcp").unlink(), "lacks __0_1.distcp"),
    "a file is cut off": (
        lambda f: (f / "release/__0_0.distcp").write_bytes(
            (f / "release/__0_0.distcp").read_bytes()[:5000]
        ),
        "damaged|cannot be read",
    ),
    "another format": (
        lambda f: (f / "release/metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}'),
        "format fsdp_dtensor",
    ),
    "tracker": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("soon"),
        "names no iteration",
    ),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_checkpoint_is_not_exported(fault, folders, tmp_path):
    from harness.convert.exporting import export_checkpoint

    spoil, says = DAMAGED[fault]
    imported(folders("llama"), tmp_path / "megatron")
    spoil(tmp_path / "megatron")
    with pytest.raises(UserError, match=says):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".*.part"))


def test_a_model_of_no_known_architecture(folders, tmp_path):
    from harness.convert.architectures import architecture_of

    with pytest.raises(UserError, match="nearest is LlamaForCausalLM, but"):
        architecture_of(
            load_catalog()
            .find("101")
            .model.model_copy(
                update={
                    "normalization": "RMSNorm",
                    "activation": "swiglu",
                    "position_embedding": "rope",
                }
            )
        )


def test_the_commands(folders, tmp_path, capsys, monkeypatch):
    from harness.convert import commands

    monkeypatch.setattr(commands, "WEIGHTS", tmp_path / "weights")
    settings = {"HF": str(folders("gpt2")), "NAME": "tiny"}
    assert commands.import_hf(settings, tmp_path / "weights") == 0
    assert "GPT2LMHeadModel, " in (said := capsys.readouterr().out) and "--num-layers 4" in said
    with pytest.raises(UserError, match="exists already"):
        commands.import_hf(settings, tmp_path / "weights")
    mine = [tmp_path / "weights" / "tiny.part" / "file", tmp_path / "back.part" / "file"]
    for path in mine:  # weights that NAME=tiny.part brought, a folder that OUT=back does not name
        path.parent.mkdir()
        path.write_text("mine")
    assert commands.import_hf({**settings, "FORCE": "1"}, tmp_path / "weights") == 0
    assert (
        commands.export_hf({"RUN": "tiny", "OUT": str(tmp_path / "back")}, tmp_path / "outdir") == 0
    )
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    with pytest.raises(UserError, match="exists already and is not empty"):
        commands.export_hf({"RUN": "tiny", "OUT": str(tmp_path / "back")}, tmp_path / "outdir")
    with pytest.raises(UserError, match="no run of this label"):
        commands.export_hf({"RUN": "nosuch", "OUT": str(tmp_path / "new")}, tmp_path / "outdir")
    with pytest.raises(UserError, match="no such folder, and no repository"):
        commands.import_hf({"HF": "/no/such/folder/at/all"}, tmp_path / "weights")
