"""The catalogue: every published id is there as intended, and mistakes in it are refused with their values."""

from pathlib import Path

import pytest

from harness.errors import UserError
from harness.experiment.catalog import load_catalog
from harness.experiment.constraints import with_changes
from harness.experiment.model import Model
from harness.planning.miniature import MOST_HEADS, MOST_MICRO_BATCHES, MOST_PROCESSES, miniature

CATALOG = load_catalog()
NVFP4 = {"precision": "fp4", "fp4_recipe": "nvfp4"}
DELAYED = {"delay_wgrad": True, "ep_overlap": True, "ep": 2, "dp": 2}
IDS = [e.id for e in CATALOG.experiments]

PUBLISHED = [
    "101",
    "104",
    "111",
    "112",
    "114",
    "115",
    "118",
    "121",
    "122",
    "124",
    "128",
    "129",
    "130",
    "211",
    "212",
    "214",
    "218",
    "219",
    "221",
    "222",
    "224",
    "228",
    "231",
    "232",
    "234",
    "238",
    "241",
    "242",
    "244",
    "248",
    "281",
    "282",
    "283",
    "300",
    "301",
    "302",
    "304",
    "308",
    "318",
    "328",
    "338",
    "348",
    "358",
    "401",
    "402",
    "404",
    "408",
    "416",
    "420",
    "424",
    "432",
    "438",
    "442",
    "443",
    "446",
    "449",
    "458",
    "498",
    "500",
    "501",
    "502",
    "503",
    "504",
    "505",
    "506",
    "511",
    "512",
]


def write(
    folder: Path,
    row: str,
    models: str = "m: {num_layers: 4, hidden_size: 64, num_attention_heads: 4}",
) -> Path:
    (folder / "models.yaml").write_text(models)
    (folder / "100-x.yaml").write_text(
        f"chapter: 100\ntitle: X\ndefaults: {{model: m, seq: 64}}\nexperiments:\n  {row}\n"
    )
    return folder


def test_every_published_id_is_in_the_catalogue() -> None:
    assert set(PUBLISHED) <= set(IDS)


@pytest.mark.parametrize(
    ("id_", "vpp", "layers_per_virtual_stage"),
    [
        ("438", 3, 3),
        ("498", 9, 1),
        ("442", 2, 9),
        ("443", 3, 6),
        ("446", 6, 3),
        ("449", 9, 2),
        ("458", 18, 1),
        ("424", 1, 18),
    ],
)
def test_virtual_stages_are_what_the_name_says(
    id_: str, vpp: int, layers_per_virtual_stage: int
) -> None:
    e = CATALOG.find(id_)
    assert e.vpp == vpp
    assert e.model.num_layers // (e.pp * e.vpp) == layers_per_virtual_stage


def test_115_really_has_a_global_batch_of_60() -> None:
    e = CATALOG.find("115")
    assert (e.global_batch_size, e.micro_batch_size, e.dp, e.sharding) == (60, 15, 4, "optim")


def test_219_spans_two_nodes_of_eight() -> None:
    e = CATALOG.find("219")
    assert (e.nodes, e.ranks_per_node, e.tp, e.dp) == (2, 8, 8, 2)


@pytest.mark.parametrize("id_", IDS)
def test_the_batch_is_never_truncated(id_: str) -> None:
    e = CATALOG.find(id_)
    assert e.num_microbatches * e.micro_batch_size * e.dp == e.global_batch_size


def test_found_by_id_and_by_full_name() -> None:
    assert CATALOG.find("101") is CATALOG.find("101-gpt2xl-dp1-gbs1-bf16")


def test_an_unknown_id_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no experiment 407; nearest ids: 401, 402, 404, 408, 416"):
        CATALOG.find("407")
    with pytest.raises(UserError, match="101 is 101-gpt2xl-dp1-gbs1-bf16"):
        CATALOG.find("101-gpt2-small")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            "101: {slug: a, mbs: 1, gbs: 1, shows: s, micro_batch: 2}",
            r"101: unknown key 'micro_batch'; .*micro_batch_size",
        ),
        ("101: {slug: a, mbs: 1, shows: s}", r"101: 'gbs' is missing"),
        (
            "101: {slug: a, mbs: '1', gbs: 1, shows: s}",
            r"101: mbs = '1': input should be a valid integer",
        ),
        (
            "101: {slug: a, mbs: 0, gbs: 1, shows: s}",
            r"101: mbs = 0: input should be greater than or equal to 1",
        ),
        (
            "101: {slug: a, mbs: 2, gbs: 3, shows: s}",
            r"101: GBS \(3\) must be divisible by MBS x DP \(2 x 1 = 2\); try MBS in \{1, 3\}, or GBS a multiple of 2\n100-x.yaml, line 5$",
        ),
        (
            "101: {slug: a, mbs: 2, gbs: 3, dp: 2, shows: s}",
            r"GBS \(3\) must be divisible by MBS x DP \(2 x 2 = 4\); set GBS to a multiple of 4\n100-x.yaml, line 5$",
        ),
        (
            "101: {slug: a, mbs: 1, gbs: 1, tp: 3, shows: s}",
            r"num_attention_heads \(4\) must be divisible by TP \(3\); try TP in \{1, 2, 4\}",
        ),
        (
            "101: {slug: a, mbs: 1, gbs: 8, pp: 2, vpp: 4, shows: s}",
            r"layers \(4\) must be divisible by PP x VPP \(2 x 4 = 8\); try VPP in \{1, 2\}",
        ),
        (
            "101: {slug: a, mbs: 1, gbs: 8, pp: 3, vpp: 2, shows: s}",
            r"layers \(4\) must be divisible by PP x VPP \(3 x 2 = 6\); try PP in \{1, 2\}",
        ),
        (
            "101: {slug: a, mbs: 1, gbs: 1, vpp: 2, shows: s}",
            r"VPP=2 interleaves pipeline stages, but PP=1",
        ),
        (
            "101: {slug: a, mbs: 1, gbs: 3, pp: 2, vpp: 2, shows: s}",
            r"micro-batches .* \(3\) must be divisible by PP \(2\) when VPP > 1",
        ),
        (
            "101: {slug: a, mbs: 1, gbs: 1, cp: 3, shows: s}",
            r"SEQ \(64\) must be divisible by 2 x CP \(2 x 3 = 6\)",
        ),
        (
            "101: {slug: a, mbs: 1, gbs: 1, cp: 8, cp_comm_type: a2a, shows: s}",
            r"num_attention_heads \(4\) must be divisible by TP x CP \(1 x 8 = 8\)",
        ),
        (
            "101: {slug: a, mbs: 1, gbs: 1, sp: true, shows: s}",
            r"SP=1 splits activations over TP, but TP=1",
        ),
        (
            "101: {slug: a, mbs: 1, gbs: 1, ep: 2, shows: s}",
            r"EP=2, ETP=1 split experts, but m has none",
        ),
        (
            "101: {slug: a, mbs: 1, gbs: 2, dp: 2, nodes: 3, shows: s}",
            r"TP x PP x CP x DP \(2\) must be divisible by NODES \(3\)",
        ),
        (
            "101: {slug: a, mbs: 1, gbs: 1, sharding: zero2, shows: s}",
            r"101: sharding = 'zero2'; valid: 'no_shard', 'optim'",
        ),
        ("101: {slug: a b, mbs: 1, gbs: 1, shows: s}", r"101: slug = 'a b' must match"),
        ("101: {slug: a, model: q, mbs: 1, gbs: 1, shows: s}", r"101: unknown model 'q'; .*m"),
        (
            "101: {slug: a, mbs: 1, gbs: 1, shows: s}\n  101: {slug: b, mbs: 1, gbs: 1, shows: s}",
            r"'101' occurs twice",
        ),
        ("10x: {slug: a, mbs: 1, gbs: 1, shows: s}", r"100-x.yaml: 10x: an id has three digits"),
        ("101: oops", r"100-x.yaml: 101: expected key: value pairs, found 'oops'"),
        ("101: {", r"100-x.yaml is not valid YAML"),
    ],
)
def test_a_mistake_is_refused_with_its_values(tmp_path: Path, row: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        load_catalog(write(tmp_path, row))


@pytest.mark.parametrize(
    ("id_", "changes", "complaint"),
    [
        ("101", {"num_attention_heads": 24}, "hidden_size (1600) must be divisible by num_attention_heads (24)"),
        ("281", {"ffn_hidden_size": 100}, "ffn_hidden_size (100) must be divisible by TP (8); try TP in {1, 2, 4}"),
        ("611", {"num_query_groups": 5}, "num_attention_heads (32) must be divisible by num_query_groups (5)"),
        ("611", {"kv_channels": 127}, "the head size (127) must be even"),
        ("101", {"positions": 1023}, "SEQ=1024: positions were learned up to 1023; set SEQ=1023 or less"),
        ("101", {"tp": 5, "sequence_parallel": True}, "SEQ / CP (1024 / 1) must be divisible by TP (5) for sequence parallelism"),
        ("620", {"yarn": None}, "position_embedding yarn, yarn missing: set both or neither"),
        ("631", {"normalization": "LayerNorm"}, "qk_norm projection is an RMS norm"),
        ("802", {"precision": "fp8", "fp8_recipe": "delayed"}, "LoRA: fp8 is not tested with adapters"),
        ("620", {"optimizer": "muon"}, "upstream's sharded muon does not take experts with biases; set SHARDING=no_shard"),
        ("511", {"moe_ffn_hidden_size": 1023}, "moe_ffn_hidden_size (1023) must be divisible by ETP (2)"),
        ("511", {"ep": 8}, "ranks of a stage, TP x CP x DP (8) must be divisible by EP x ETP (8 x 2 = 16); "
                           "try EP in {1, 2, 4}"),
        ("101", {"grouped_gemm": "cublas"}, "GROUPED_GEMM is about experts, and gpt2-xl has none; leave it out"),
        ("101", {"moe_dispatcher": "allgather"}, "MOE_DISPATCHER is about experts"),
        ("613", {"fp8_recipe": "mxfp8", "card": "h200-141gb"}, "NVIDIA H200 has no tensor cores that scale by 32 values"),
        ("613", {"fp8_recipe": "mxfp8", "fp8_params": True}, "set FP8_PARAMS=0"),
        ("613", {"fp8_recipe": "mxfp8", "seq_length": 8176}, "fp8 mxfp8 multiplies in blocks of 32: the tokens of a rank, MBS x SEQ / CP (8176)"),
        ("613", {"fp4_recipe": "nvfp4"}, "FP4=nvfp4 and FP8=tensorwise: upstream takes one of them; set FP8=0 or FP4=0"),
        ("611", {"precision": "fp4"}, "precision fp4, fp4_recipe None: fp4, and nothing else, needs a recipe: nvfp4"),
        ("611", {**NVFP4, "card": "h200-141gb"}, "NVIDIA H200 has no tensor cores for it; Transformer Engine asks for compute capability 10.0 (Blackwell) or higher; set FP8=tensorwise in its place"),
        ("611", {**NVFP4, "card": "a100-80gb"}, "10.0 (Blackwell) or higher; set FP4=0"),
        ("611", {**NVFP4, "card": "rtx4090"}, "FP4=nvfp4: NVIDIA GeForce RTX 4090 has no tensor cores for it"),
        ("611", {**NVFP4, "fp8_params": True}, "FP8_PARAMS=1 is for trained weights with FP8= and SHARDING=optim, not for fp4 with optim"),
        ("611", {**NVFP4, "seq_length": 8176}, "fp4 nvfp4 multiplies in blocks of 32: the tokens of a rank, MBS x SEQ / CP (8176), must be divisible by 32"),
        ("611", {**NVFP4, "tp": 4, "dp": 1, "sequence_parallel": True, "seq_length": 8224}, "in blocks of 16: the tokens of a rank, MBS x SEQ / CP / TP (2056)"),
        ("282", {**NVFP4, "tp_overlap": True}, "FP4=nvfp4: Transformer Engine's userbuffers send no NVFP4; set TP_OVERLAP=0"),
        ("502", {**NVFP4, "ep_overlap": True}, "with EP_OVERLAP=1 upstream computes layers in bf16 all the same; set EP_OVERLAP=0, or FP8=mxfp8"),
        ("632", {**NVFP4, "grouped_gemm": "fused", "recompute": "none", "recompute_modules": ()}, "GROUPED_GEMM=fused is for bf16; set GROUPED_GEMM=cublas, or FP4=0"),
        ("611", {"extra_args": ("--fp4-param-gather",)}, "ARGS: --fp4-param-gather is part of FP4=nvfp4; set that too"),
        ("802", NVFP4, "LoRA: fp4 is not tested with adapters"),
        ("101", {"delay_wgrad": True}, "DELAY_WGRAD is about experts, and gpt2-xl has none; leave it out"),
        ("502", {"delay_wgrad": True}, "EP_OVERLAP=1 sends another micro-batch's tokens; set EP_OVERLAP=1, or DELAY_WGRAD=0"),
        ("941", {"delay_wgrad": True}, "DELAY_WGRAD=1: with TP_OVERLAP=1 Transformer Engine exchanges"),
        ("632", {**DELAYED, "cuda_graphs": ("attn",), "sharding": "optim"}, "DELAY_WGRAD=1 with CUDA_GRAPHS=attn: a graph adds gradients up at fixed addresses only; set GRAD_FUSION=1"),
        ("620", {**DELAYED, "cuda_graphs": ("attn",), "gradient_fusion": True, "sharding": "optim"}, "DELAY_WGRAD=1 with CUDA_GRAPHS=attn: gradients of attention's biases cannot be captured; leave attn out"),
        ("101", {"router_fusion": True}, "ROUTER_FUSION is about experts"),
        ("101", {"moe_capacity": 1.0}, "MOE_CAPACITY is about experts"),
        ("502", {"moe_backend": "hybridep"}, "MOE_BACKEND=hybridep is for MOE_DISPATCHER=flex, not alltoall"),
        ("502", {"shared_expert_overlap": True}, "olmoe-half-64e has no shared expert"),
        ("941", {"shared_expert_overlap": True}, "set SHARED_EXPERT_OVERLAP=0"),
        ("941", {"shared_expert_overlap": True, "ep_overlap": False, "moe_dispatcher": "allgather"}, "alltoall or flex, not allgather"),
        ("941", {"shared_expert_overlap": True, "ep_overlap": False, "recompute": "selective", "recompute_modules": ("shared_experts",)}, "leave shared_experts out"),
        ("611", {"deterministic": True, "cross_entropy_fusion": True}, "set CROSS_ENTROPY_FUSION=0"),
        ("901", {"deterministic": True}, "set TP_OVERLAP=0"),
        ("632", {"grouped_gemm": "cublas", "card": "a100-80gb"}, "GROUPED_GEMM=cublas does not run on NVIDIA A100"),
        ("632", {"grouped_gemm": "cutlass", "card": "b200-180gb"}, "GROUPED_GEMM=cutlass does not run on NVIDIA B200"),
        ("632", {"grouped_gemm": "cublas", "precision": "fp8", "fp8_recipe": "delayed"}, "set FP8=tensorwise or blockwise"),
        ("632", {"grouped_gemm": "cutlass", "precision": "fp8", "fp8_recipe": "tensorwise"}, "GROUPED_GEMM=cutlass is for bf16"),
        ("632", {"grouped_gemm": "fused", "card": "a100-80gb"}, "GROUPED_GEMM=fused does not run on NVIDIA A100"),
        ("632", {"grouped_gemm": "fused"}, "GROUPED_GEMM=fused does not take RECOMPUTE_MODULES=moe_act"),
        ("502", {"grouped_gemm": "fused"}, "GROUPED_GEMM=fused does not take the activation gelu"),
        ("511", {"grouped_gemm": "fused"}, "GROUPED_GEMM=fused does not take ETP=2"),
        ("502", {"grouped_gemm": "fused", "optimizer": "muon"}, "GROUPED_GEMM=fused does not take OPTIMIZER=muon"),
        ("511", {"moe_router_topk": 257}, "moe_router_topk (257) exceeds the number of experts (256)"),
    ],
)  # fmt: skip
def test_a_change_that_does_not_fit_is_refused_with_its_values(id_, changes, complaint) -> None:
    e = CATALOG.find(id_)
    if changes.keys() <= Model.model_fields.keys():
        changes = {"model": e.model.model_copy(update=changes)}
    with pytest.raises(UserError) as refused:
        with_changes(e, **changes)
    assert complaint in str(refused.value)


def test_an_id_of_two_chapters_is_refused(tmp_path: Path) -> None:
    chapter = (
        write(tmp_path, "101: {slug: a, mbs: 1, gbs: 1, shows: s}") / "100-x.yaml"
    ).read_text()
    (tmp_path / "200-y.yaml").write_text(chapter.replace("chapter: 100", "chapter: 200"))
    with pytest.raises(UserError, match=r"200-y.yaml: experiment 101 is already in chapter 100"):
        load_catalog(tmp_path)


def test_expert_sizes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    models = "m: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, num_experts: 8, moe_router_topk: 2}"
    row = "101: {slug: a, mbs: 1, gbs: 6, dp: 6, ep: 4, shows: s}"
    with pytest.raises(
        UserError, match=r"\(6\) must be divisible by EP x ETP \(4 x 1 = 4\); try EP in \{1, 2\}"
    ):
        load_catalog(write(tmp_path, row, models))


@pytest.mark.parametrize("id_", IDS)
def test_a_miniature_keeps_the_topology(id_: str) -> None:
    full = CATALOG.find(id_)
    small = miniature(full)
    assert small.miniature and small.world_size <= MOST_PROCESSES and small.nodes == 1
    assert small.micro_batch_size == full.micro_batch_size
    assert (small.vpp, small.etp, small.sharding, small.recompute) == (
        full.vpp,
        full.etp,
        full.sharding,
        full.recompute,
    )
    axes = ("tp", "pp", "cp", "dp", "ep")
    pairs = [(getattr(small, axis), getattr(full, axis)) for axis in axes]
    heads, all_heads = ((e.model.num_attention_heads, e.model.key_heads) for e in (small, full))
    assert heads[0] * all_heads[1] == heads[1] * all_heads[0], "as many queries for each key"
    if full.world_size <= MOST_PROCESSES:
        assert heads == all_heads and all(kept == all_of_it for kept, all_of_it in pairs)
        assert small.num_microbatches == full.num_microbatches
    else:
        assert id_ == "219" or full.chapter == 900
        assert heads[0] <= MOST_HEADS and heads[1] % small.tp == 0
        assert all(all_of_it % kept == 0 for kept, all_of_it in pairs)
        assert small.num_microbatches == min(full.num_microbatches, MOST_MICRO_BATCHES)


@pytest.mark.parametrize(("id_", "layout"), [
    ("101", "one GPU"), ("283", "tp8 full recompute"), ("308", "cp8"), ("328", "cp8 a2a"), ("438", "pp8 vpp3 m8"),
    ("511", "ep4 etp2 dp8 ZeRO-2"), ("612", "dp4 m2 ZeRO-2 fp8 delayed"), ("671", "muon"), ("706", "dp4 FSDP2"),
    ("642", "ep8 dp8 m2 ZeRO-2 selective recompute bf16 moments"), ("282", "tp8+sp"),
])  # fmt: skip
def test_a_layout_is_said_in_a_few_words(id_: str, layout: str) -> None:
    assert CATALOG.find(id_).layout == layout


def test_names_and_labels() -> None:
    e = CATALOG.find("101")
    assert e.name == e.label == "101-gpt2xl-dp1-gbs1-bf16"
    assert miniature(e).label == "101-gpt2xl-dp1-gbs1-bf16_cpu"


@pytest.mark.parametrize(
    "half", [e for e in load_catalog().experiments if e.half_of], ids=lambda e: e.id
)
def test_a_half_size_companion_runs_on_half_the_gpus(half):
    whole = load_catalog().find(half.half_of)
    assert half.world_size * 2 == whole.world_size
    assert half.num_microbatches == whole.num_microbatches
    assert whole.pp == 1 or half.model.num_layers // half.pp == whole.model.num_layers // whole.pp
    kept = (
        "vpp",
        "sequence_parallel",
        "cp_comm_type",
        "recompute",
        "sharding",
        "attention_backend",
    )
    assert all(getattr(half, name) == getattr(whole, name) for name in kept)


def test_all_to_all_shares_out_key_heads_too():
    """32 query heads, 8 key heads over tp x cp = 16."""
    with pytest.raises(
        UserError,
        match=r"num_query_groups \(8\) must be divisible by TP x CP \(4 x 4 = 16\); try CP in \{1, 2\}",
    ):
        with_changes(
            CATALOG.find("611"), tp=4, cp=4, dp=1, sequence_parallel=True, cp_comm_type="a2a"
        )
