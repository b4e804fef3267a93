"""Index mappings: the files that upstream would write, there before it looks for them."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from harness.data import data_sets, mappings
from harness.data.data_sets import Blend, DataSet
from harness.data.indexed import DTYPES, PairWriter
from harness.data.mappings import SampleRequest
from harness.data.splits import samples_of
from harness.entry.build_helpers import ensure_compiled
from harness.errors import UserError


def data_set(
    folder: Path, name: str, documents: int, seed: int, vocab_size: int = 60000
) -> DataSet:
    rng = np.random.default_rng(seed)
    prefix = data_sets.prefix_of(name, folder)
    prefix.parent.mkdir(parents=True)
    lengths = rng.integers(1, 60, documents)
    writer = PairWriter(prefix, DTYPES[8])
    writer.append(rng.integers(0, 50000, lengths.sum()), lengths, np.arange(1, documents + 1))
    writer.finish()
    return DataSet(
        name,
        prefix,
        "NullTokenizer",
        None,
        vocab_size,
        "x",
        documents,
        documents,
        int(lengths.sum()),
        f"{name} {seed}",
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")
    }


def test_samples_are_counted_as_upstream_counts_them():
    assert samples_of(100, 8, 50, 10) == (800, 240, 80)
    assert samples_of(20, 4, 50, 10) == (80, 40, 40)


CASES = {
    "less than an epoch": ((100, 10, 5), "949,50,1", 3000),
    "exactly some epochs": ((500, 20, 5), "949,50,1", 3000),
    "last epoch by itself": ((2000, 60, 20), "949,50,1", 1500),
    "last epoch nearly whole": ((1820, 40, 20), "90,9,1", 1500),
    "many epochs": ((9000, 3000, 700), "98,1,1", 600),
    "no test": ((300, 40, 0), "90,10,0", 600),
    "nothing wanted": ((0, 0, 0), "90,5,5", 600),
}


@pytest.mark.cpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weights", [(), ("0.7", "0.3"), ("3", "1")])
def test_the_files_are_those_of_upstream(tmp_path, name, weights):
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    ensure_compiled()  # a tree that an earlier test imported may lack what a wheel brings
    samples, split, documents = CASES[name]
    if weights and name == "nothing wanted":
        pytest.skip("upstream itself cannot blend nothing")
    sets = tuple(
        data_set(tmp_path, f"set{n}", documents // (n + 1), n) for n in range(len(weights) or 1)
    )
    blend, use = Blend(sets, weights), SampleRequest(64, samples, split, seed=77)
    tokenizer = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=60000, pad_id=-1
    )
    config = GPTDatasetConfig(
        random_seed=77,
        sequence_length=64,
        blend=([str(chosen.prefix) for chosen in sets], [float(w) for w in weights] or None),
        split=split,
        path_to_cache=str(tmp_path / "upstream"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    BlendedMegatronDatasetBuilder(GPTDataset, list(samples), lambda: True, config).build()
    written = mappings.build(blend, use)
    ours, theirs = files(blend.cache), files(tmp_path / "upstream")
    assert ours.keys() == theirs.keys()
    assert ours == theirs
    assert written == len(ours)
    assert mappings.build(blend, use) == 0


@pytest.mark.cpu
def test_a_prepared_set_is_described_as_upstreams_run_describes_it(tmp_path, monkeypatch):
    """With the arguments that a run gives: the tokenizer is in the description, by its type and path."""
    import argparse

    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import _add_tokenizer_args

    home = Path(mappings.__file__).parents[2] / "data" / "tokenizers" / "gpt2"
    if not home.is_dir():
        pytest.skip("GPT-2's vocabulary is not here: make data-… brings it")
    chosen = data_set(tmp_path, "mine", 500, 0)
    parser = argparse.ArgumentParser()
    _add_tokenizer_args(parser)
    for kind, model in (("HuggingFaceTokenizer", home), ("NullTokenizer", None)):
        words = [
            "--tokenizer-type",
            kind,
            *(["--tokenizer-model", str(model)] if model else ["--vocab-size", "60000"]),
        ]
        arguments = parser.parse_args(words)
        (
            arguments.rank,
            arguments.make_vocab_size_divisible_by,
            arguments.tensor_model_parallel_size,
        ) = 0, 128, 1
        config = GPTDatasetConfig(
            random_seed=1234,
            sequence_length=64,
            blend=([str(chosen.prefix)], None),
            split="949,50,1",
            path_to_cache=str(tmp_path / kind),
            tokenizer=build_tokenizer(arguments),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
        )
        indices = np.arange(475, dtype=np.int32)
        theirs = GPTDataset(
            IndexedDataset(str(chosen.prefix)), str(chosen.prefix), indices, 50, Split.train, config
        )
        described = DataSet(**{**vars(chosen), "tokenizer_type": kind, "tokenizer_model": model})
        use = SampleRequest(64, (50, 10, 10), "949,50,1")
        ours = mappings._Builder(Blend((described,)), use).describe(chosen.prefix, "train", 50)
        assert json.dumps(ours, indent=4) == theirs.unique_description


@pytest.mark.cpu
def test_a_blend_is_described_with_the_one_tokenizer_of_its_run(tmp_path):
    sets = [data_set(tmp_path, name, 500, 0) for name in ("a", "b")]
    folders = [Path("/tokenizer/of") / chosen.name for chosen in sets]
    kinds = {"tokenizer_type": "HuggingFaceTokenizer"}
    sets = [
        DataSet(**vars(s) | kinds | {"tokenizer_model": f})
        for s, f in zip(sets, folders, strict=True)
    ]
    blend = Blend(tuple(sets), ("1", "1"))
    mappings.build(blend, SampleRequest(64, (50, 10, 10), "90,9,1"))
    described = [path.read_text() for path in blend.cache.glob("*description.txt")]
    assert len(described) == 9
    assert all("/tokenizer/of/a" in text and "/tokenizer/of/b" not in text for text in described)


@pytest.mark.cpu
def test_a_split_without_tokens_is_refused_before_upstream_hangs(tmp_path):
    blend = Blend((data_set(tmp_path, "mine", 40, 0),))
    with pytest.raises(
        UserError, match="of its 40 sequences the split 949,50,1 leaves none for test"
    ):
        mappings.build(blend, SampleRequest(64, (10, 10, 10), "949,50,1"))


@pytest.mark.cpu
def test_launchers_that_start_at_once_build_once(tmp_path):
    blend, use = (
        Blend((data_set(tmp_path, "mine", 3000, 0),)),
        SampleRequest(64, (500, 50, 50), "949,50,1"),
    )
    written = []
    threads = [
        threading.Thread(target=lambda: written.append(mappings.build(blend, use)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == [0, 0, 0, 12]
