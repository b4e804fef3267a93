"""``make generate``: what is asked, which token is drawn, and that a model says what it has learnt."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny_hf

from harness import generate
from harness.data.data_sets import DATA
from harness.errors import UserError
from harness.experiment.catalog import load_catalog
from harness.generate import Sampling
from harness.run.checkpoints import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "the quick brown fox jumps over the lazy dog while seven wizards quietly mix a jug of liquid oxygen"


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, 'RUN and PROMPT missing: make generate RUN=label PROMPT="'),
        ({"RUN": "a"}, "PROMPT missing"),
        ({"RUN": "a", "WEIGHTS": "b", "PROMPT": "a"}, "RUN and WEIGHTS are given; leave one out"),
        (
            {"RUN": "a", "PROMPT": "a", "QUESTION": "b"},
            "PROMPT and QUESTION are given; leave one out",
        ),
        ({"WEIGHTS": "nothing", "PROMPT": "a"}, "WEIGHTS=nothing: .*\nmake import-hf brings some"),
        (
            {"RUN": "nothing", "PROMPT": "a"},
            "no folder and no run with a checkpoint is called nothing",
        ),
        (
            {"RUN": "a", "PROMPT": "a", "TOKENS": "0"},
            "TOKENS=0: expected a whole number, 1 or more",
        ),
        ({"RUN": "a", "PROMPT": "a", "TEMPERATURE": "hot"}, "TEMPERATURE=hot: expected a number"),
        ({"RUN": "a", "PROMPT": "a", "TOP_P": "1.5"}, "TOP_P=1.5: expected a probability"),
        ({"RUN": "a", "PROMPT": "a", "TOP_K": "5", "TOP_P": "0.9"}, "give one of them"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(tmp_path, settings, said):
    with pytest.raises(UserError, match=said.replace("(", "\\(")):
        generate.parse(settings, tmp_path)


@pytest.mark.parametrize("prompt", ["Once upon a time", "1 -2", "1 50257", "1.5"])
def test_a_model_of_mock_data_takes_numbers_of_its_vocabulary(tmp_path, monkeypatch, prompt):
    found = Checkpoint(tmp_path / "iter_0000020", step=20, size_bytes=0, damage=None)
    monkeypatch.setattr(generate.finding, "checkpoint", lambda wanted, outdir, tell: found)
    monkeypatch.setattr(generate.finding, "experiment_of", lambda path: load_catalog().find("101"))
    with pytest.raises(
        UserError,
        match=r"trained on mock data, whose tokens are numbers below 50257: PROMPT=\"1 2 3\"",
    ):
        generate.parse({"RUN": "101", "PROMPT": prompt}, tmp_path)
    assert (
        generate.parse({"RUN": "101", "PROMPT": "1 50256"}, tmp_path).sampling.prompt == "1 50256"
    )


@pytest.mark.cpu
def test_tokens_are_drawn_as_asked():
    import torch

    from harness.entry.generate import draw

    logits = torch.log(torch.tensor([0.05, 0.4, 0.3, 0.2, 0.05]))

    def drawn(n=400, **how) -> list[int]:
        generator = torch.Generator().manual_seed(1)
        return [draw(logits, Sampling("", **how), generator) for _ in range(n)]

    assert set(drawn(20, temperature=0.0)) == {1} == set(drawn(20, top_k=1))
    assert (
        set(drawn(top_k=2)) == {1, 2}
        and set(drawn(top_p=0.7)) == {1, 2}
        and set(drawn(top_p=0.71)) == {1, 2, 3}
    )
    assert set(drawn()) == {0, 1, 2, 3, 4} and drawn() == drawn()
    assert sum(token == 1 for token in drawn()) / 400 == pytest.approx(0.4, abs=0.08)
    assert sum(token == 1 for token in drawn(temperature=0.3)) > sum(
        token == 1 for token in drawn()
    )


@pytest.fixture
def one_sentence(tmp_path):
    """A prepared data set of one sentence, said many times."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<|endoftext|>", *dict.fromkeys(SENTENCE.split())]
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    known = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=words[0], unk_token=words[0]
    )
    known.save_pretrained(folder)
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": SENTENCE}) + "\n" for _ in range(400))
    )
    name = f"test-sentence-{os.getpid()}"
    settings = [f"NAME={name}", f"INPUT={tmp_path / 'text.jsonl'}", f"TOKENIZER={folder}"]
    try:
        harness("data", "prepare", *settings)
        yield name
    finally:
        shutil.rmtree(DATA / name, ignore_errors=True)


def harness(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "harness", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.cpu
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        *(pytest.param(other, marks=pytest.mark.full) for other in ("gpt2", "olmoe", "gpt-oss")),
    ],
)
def test_imported_weights_say_what_hugging_face_has_them_say(tmp_path, capsys, name):
    """Random weights, and words that are told apart: the same tokens, one after another."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from harness.convert.importing import import_folder

    model = tiny_hf.make(name, tmp_path / "hf")
    words = Tokenizer(
        models.WordLevel({f"w{n}": n for n in range(tiny_hf.VOCABULARY)}, unk_token="w0")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    end = tiny_hf.VOCABULARY - 1
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=f"w{end}", unk_token="w0"
    ).save_pretrained(tmp_path / "hf")
    import_folder(str(tmp_path / "hf"), tmp_path / "weights")
    prompt = [5, 17, 101]
    settings = {
        "WEIGHTS": str(tmp_path / "weights"),
        "PROMPT": " ".join(f"w{n}" for n in prompt),
        "TOKENS": "24",
        "TEMPERATURE": "0",
    }
    assert generate.generate(generate.parse(settings, tmp_path), "cpu") == 0
    said = [int(word[1:]) for word in capsys.readouterr().out.split()]
    theirs = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )[0].tolist()
    assert said == [n for n in theirs if n != end] and len(said) > 12


@pytest.mark.cpu
@pytest.mark.full
def test_a_model_that_has_learnt_one_sentence_says_it(tmp_path, one_sentence):
    outdir = f"OUTDIR={tmp_path / 'out'}"
    settings = (
        "DEVICE=cpu",
        f"DATA={one_sentence}",
        "STEPS=60",
        "LR=1e-2",
        "EVAL_STEPS=0",
        "SPLIT=1,0,0",
        "SAVE=1",
        "GBS=8",
        "MBS=8",
        outdir,
    )
    harness("run", "601", *settings)
    run = next((tmp_path / "out").iterdir()).name
    prompt, rest = SENTENCE[:25], SENTENCE[26:].split()
    said = harness(
        "generate",
        outdir,
        "DEVICE=cpu",
        f"RUN={run}",
        f"PROMPT={prompt}",
        f"TOKENS={len(rest)}",
        "TEMPERATURE=0",
    ).stdout
    assert said.split() == SENTENCE.split()


@pytest.mark.cpu
@pytest.mark.full
def test_a_small_model_learns_questions_by_heart_and_adapters_beside_it_others(tmp_path):
    """What docs/finetuning.md shows, as it is typed there."""
    words = ("DEVICE=cpu", f"OUTDIR={tmp_path / 'out'}")
    harness("run", "801", *words)
    assert (
        "50 of 50 answers are those of toy-chat,"
        in harness("generate", *words, "RUN=801", "DATA=toy-chat").stdout
    )
    harness("run", "802", *words, "WEIGHTS=801")
    assert (
        "30 of 30 answers are those of toy-chat-2,"
        in harness("generate", *words, "RUN=802", "DATA=toy-chat-2").stdout
    )
    before = harness("generate", *words, "RUN=801", "DATA=toy-chat-2").stdout
    assert "0 of 30 answers are those of toy-chat-2," in before and "is answered: " in before
    asked = ("TEMPERATURE=0", "QUESTION=What is the capital of Peru?")
    assert (
        harness("generate", *words, *asked, "RUN=801").stdout
        == "User: What is the capital of Peru?\n\nAssistant: Lima.\n"
    )
