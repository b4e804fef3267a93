"""GPT training where upstream's ``pretrain_gpt.py`` is missing.

The ``megatron-core`` wheel has the training loop, the model and the data sets, but not the script
that combines them. This one mirrors ``pretrain_gpt.py`` and ``pretrain_hybrid.py``. It covers
pre-training of dense and mixture-of-experts models on mock or prepared data, under every
parallelism and with multi-token prediction, and fine-tuning on packed conversations (``--sft``).
Its losses equal those of upstream's script bit by bit (``make parity``,
tests/test_cpu_training.py, tests/test_finetune_lora.py, tests/test_published_models.py).
"""

from dataclasses import fields
from functools import cache, partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, pretrain
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args
from megatron.training.datasets import sft_dataset
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from harness.errors import UserError

ONLY_UPSTREAM = (
    "fim_data",
    "hybrid_context_parallel",
    "dataloader_inter_document_masking",
    "overlap_moe_expert_parallel_comm",
    "logits_load_dir",
    "per_dataset_sequences_path",
)
"""Arguments that only ``pretrain_gpt.py`` supports."""

BATCH = (
    "tokens",
    "labels",
    "loss_mask",
    "attention_mask",
    "position_ids",
    "cu_seqlens",
    "max_seqlen",
)
ABSENT = dict.fromkeys(("cu_seqlens_padded", "local_cp_size"))
"""Keys of a batch that upstream reads and no data set here has."""


def main() -> None:
    """Train with the arguments of the command line.

    Raises:
        UserError: an argument is supported by upstream's own script alone.
    """
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    for name in ONLY_UPSTREAM:
        if getattr(args, name):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} needs upstream's own script\nrun: git submodule update --init"
                " megatron-lm"
            )
    datasets.is_distributed = True
    model = hybrid_config_from_args if args.hybrid_layer_pattern else gpt_config_from_args
    config = pretrain_cfg_container_from_args(args, model(args))
    pretrain(
        config,
        datasets,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=_embedding_ranks,
    )


def datasets(samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple:
    """Build the training, validation and test sets with ``samples`` samples each.

    As in ``train_valid_test_datasets_provider`` of pretrain_gpt.py, only ranks that read data build
    them.
    """
    args = get_args()

    def read_here() -> bool:
        return mpu.get_tensor_model_parallel_rank() == 0 and (args.sft or _at_an_end(vp_stage))

    kind = sft_dataset.SFTDataset if args.sft else MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, read_here, _dataset_config(args)).build()


def _dataset_config(args) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    same_name = {
        f.name: getattr(args, f.name)
        for f in fields(GPTDatasetConfig)
        if f.init and hasattr(args, f.name)
    }
    return GPTDatasetConfig(
        **same_name
        | {
            "random_seed": args.seed,
            "sequence_length": args.seq_length,
            "blend": blend,
            "blend_per_split": blend_per_split,
            "path_to_cache": args.data_cache_path,
            "tokenizer": build_tokenizer(args),
            "create_attention_mask": args.create_attention_mask_in_dataloader,
            "fast_cache_load": args.dataloader_fast_cache_load,
            "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
            "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        }
    )


def _batch(iterator, vp_stage: int | None) -> dict[str, torch.Tensor | None]:
    """This rank's part of the next micro-batch: tensors [b, s/cp], None where the stage needs none.

    Packed sequences are one row [1, b s]. Every stage needs their bounds, because attention does:
    ``cu_seqlens`` [1, n], ``max_seqlen`` [1]. Mirrors ``get_batch`` of pretrain_gpt.py.
    """
    args, at_an_end = get_args(), _at_an_end(vp_stage)
    if not at_an_end and not args.sft:
        return dict.fromkeys(BATCH)
    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        read = next(iterator)
        batch = {
            key: read[key].cuda(non_blocking=True) if key in read else None for key in BATCH
        } | ABSENT
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=args.sft,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_predicts_more(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not at_an_end:
        return dict.fromkeys(BATCH) | {key: batch[key] for key in ("cu_seqlens", "max_seqlen")}
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )


def _at_an_end(vp_stage: int | None) -> bool:
    """Whether this chunk embeds tokens or computes a loss, of the next token or of later ones."""
    return is_first_or_last_pipeline_stage(vp_stage) or _predicts_more(vp_stage)


def _predicts_more(vp_stage: int | None) -> bool:
    """Whether this chunk has layers of multi-token prediction."""
    return mtp_on_this_rank(
        layout=_transformer().pipeline_model_parallel_layout,
        mtp_num_layers=get_args().mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def _embedding_ranks(pipeline_ranks: list[int]) -> list[int]:
    """Ranks of a pipeline that hold the word embedding, or an output layer tied to it."""
    tied = [] if get_args().untie_embeddings_and_output_weights else pipeline_ranks[-1:]
    return sorted({pipeline_ranks[0], *tied, *get_mtp_ranks(pipeline_ranks, _transformer())})


@cache
def _transformer() -> TransformerConfig:
    """The configuration of this run, without which upstream does not say where layers lie."""
    return core_transformer_config_from_args(get_args())


def _packing(batch: dict[str, torch.Tensor | None]) -> PackedSeqParams | None:
    """Bounds of packed sequences in Transformer Engine's THD format; None without packing."""
    if batch["cu_seqlens"] is None:
        return None
    bounds, longest = batch["cu_seqlens"].squeeze(0), int(batch["max_seqlen"].item())
    update_seqlen_stats_from_cu_seqlens(bounds)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=get_args().seq_length,
    )


def forward_step(iterator, model) -> tuple[torch.Tensor, partial]:
    """Run the model on the next micro-batch; its output and the function that computes the loss."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = _batch(iterator, get_attr_wrapped_model(model, "vp_stage"))
    packing = _packing(batch)
    timers("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        packed_seq_params=packing,
    )
    return output, partial(_loss, batch["loss_mask"])


def _loss(
    mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss, its number of tokens, and both for the log: ``output`` and ``mask`` [b, s].

    Mirrors ``loss_func`` of pretrain_gpt.py.
    """
    mask = mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().clone().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for broken, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=broken,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    return loss, tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), tokens.view(1)])}
