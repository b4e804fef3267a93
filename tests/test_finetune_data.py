"""``make data-chat`` and what a run reads of it: answers, segments, what is cut and skipped."""

import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

np = pytest.importorskip("numpy", reason="the set-up stage `heavy` is not installed")
pytest.importorskip("tokenizers", reason="the set-up stage `heavy` is not installed")

from tokenizers import Tokenizer  # noqa: E402

from harness.data import data_sets  # noqa: E402
from harness.data.check import check  # noqa: E402
from harness.errors import UserError  # noqa: E402
from harness.experiment.catalog import load_catalog  # noqa: E402
from harness.experiment.constraints import with_changes  # noqa: E402
from harness.machine.upstream import locate, put_on_path  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from tiny_chat import READ, conversation, prepare, write_lines  # noqa: E402

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True, scope="module")
def upstream_first():
    """Before transformers imports what it finds of Megatron-LM."""
    put_on_path(locate())


END = 256  # the byte tokenizer's end of document


def test_a_data_set_of_conversations(tmp_path):
    lines = [conversation("q", "a", "r", "b", system="s"), {"text": "none"}, conversation("q")]
    manifest, skipped = prepare(tmp_path, write_lines(tmp_path / "chat.jsonl", lines))
    assert dict(skipped.by_rule) == {"no messages": 1, "no answer": 1} and skipped.first == {
        "no messages": 2,
        "no answer": 3,
    }
    assert (
        manifest.chat.template == "simple"
        and manifest.counted.documents == 1
        and manifest.counted.records == 3
    )
    assert all(finding.right for finding in check("chat", tmp_path))
    chosen = data_sets.find("chat", tmp_path)
    assert chosen.chat and (chosen.home / "tokenizer" / "chat_template.jinja").exists()
    backend = Tokenizer.from_file(str(chosen.tokenizer_model / "tokenizer.json"))
    ids = np.fromfile(tmp_path / "chat" / "chat_text_document.bin", np.uint16)
    end = "<|endoftext|>"
    assert (
        backend.decode(ids, skip_special_tokens=False)
        == f"s\n\nUser: q\n\nAssistant: a{end}\n\nUser: r\n\nAssistant: b{end}"
    )
    with pytest.raises(UserError, match="is prepared already"):
        prepare(tmp_path, tmp_path / "chat.jsonl")


def test_a_tokenizers_own_template_is_used(tmp_path):
    from harness.data.chat.byte_tokenizer import byte_folder

    folder = byte_folder(tmp_path)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    manifest, _ = prepare(
        tmp_path, write_lines(tmp_path / "c.jsonl", [conversation("q", "a")]), str(folder)
    )
    assert manifest.chat.template == "own" and manifest.counted.tokens == len(
        "[user]q_[assistant]a_"
    )
    assert manifest.chat.answer_tokens == len("a_")


@pytest.mark.parametrize(
    ("lines", "tokenizer", "said"),
    [
        ([{"text": "x"}, conversation("q")], "bytes", "no conversation in 2 lines"),
        ([conversation("q", "a")], "null:100", "conversations need"),
        ([conversation("q", "a")], "nowhere", "no tokenizer nowhere"),
    ],
)
def test_nothing_is_left_of_what_cannot_be_prepared(tmp_path, lines, tokenizer, said):
    with pytest.raises(UserError, match=said):
        prepare(tmp_path, write_lines(tmp_path / "c.jsonl", lines), tokenizer)
    assert "chat" not in data_sets.prepared_names(tmp_path) and not (tmp_path / "chat").exists()


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        prepare(tmp_path, tmp_path / "none.jsonl")


def read(pair, number: int, length: int) -> tuple[list[dict], str]:
    done = subprocess.run([*READ, str(pair), str(number), str(length)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return pickle.loads(done.stdout), done.stderr.decode()


def test_what_a_run_reads(tmp_path):
    long = conversation("x" * 10, "y" * 200)
    hopeless = conversation("z" * 300, "a")
    texts = [conversation(f"{n}?", f"{n}!") for n in range(5)]
    prepare(tmp_path, write_lines(tmp_path / "c.jsonl", [*texts, long, hopeless]))
    samples, said = read(data_sets.prefix_of("chat", tmp_path), 6, 64)
    assert (
        "6 conversations in 4 sequences of 64" in said
        and "cut at the end: 1; skipped, no answer within a sequence: 1" in said
    )
    seen = set()
    for sample in samples[:4]:
        bounds = sorted(set(sample["cu_seqlens"].tolist()))
        assert (
            bounds[0] == 0
            and bounds[-1] == 64
            and int(sample["max_seqlen"]) == max(b - a for a, b in pairwise(bounds))
        )
        for begin, end in pairwise(bounds):
            assert sample["position_ids"][begin:end].tolist() == list(range(end - begin))
            labels, mask = sample["labels"][begin:end], sample["loss_mask"][begin:end].bool()
            if not mask.any():  # padding
                continue
            question = bytes(sample["tokens"][begin:end].tolist()).decode()
            learned = labels[mask].tolist()
            assert question.startswith("User: ")
            if "x" in question:
                assert end - begin == 64 and set(learned) == {ord(" "), ord("y")}
            else:
                number = question[len("User: ")]
                assert learned == [*f" {number}!".encode(), END], (
                    "the answer and its end, nothing else"
                )
                seen.add(number)
    assert seen == set("01234")
    again, _ = read(data_sets.prefix_of("chat", tmp_path), 6, 64)
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(samples, again, strict=True))


@pytest.fixture
def chat(tmp_path, monkeypatch):
    """Conversations as the data set ``chat``, for plans."""
    prepare(tmp_path, write_lines(tmp_path / "chat.jsonl", [conversation("q", "a")] * 9))
    find = data_sets.find
    monkeypatch.setattr(data_sets, "find", lambda name, folder=tmp_path: find(name, tmp_path))
    return {"DATA": "chat", "OUTDIR": str(tmp_path)}


def test_a_narrow_model_learns_as_fast_as_a_wide_one(chat):
    from harness.planning.plan import plan

    def rate(id_: str, **settings: str) -> float:
        return plan(load_catalog().find(id_), chat | settings, "cpu").experiment.lr

    wide = load_catalog().find("801")
    assert rate("801") == wide.lr * wide.model.hidden_size / 64 and rate("801", LR="1e-3") == 1e-3
    assert rate("802") == load_catalog().find("802").lr, (
        "adapters begin as nothing, whatever the width"
    )


def test_a_notice_says_that_adapters_on_random_weights_learn_little(chat):
    from harness.planning.plan import plan

    assert (
        "adapters on random weights learn little"
        in plan(load_catalog().find("802"), chat, "cpu").notices[0]
    )
    assert not plan(load_catalog().find("801"), chat, "cpu").notices


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"CP": "2"}, "set CP=1"),
        ({"CUDA_GRAPHS": "1"}, "set CUDA_GRAPHS=0"),
        ({"PP": "2"}, "MBS=1"),
        ({"SPLIT": "98,1,1"}, "conversations"),
        ({"WEIGHTS": "nothing"}, "import-hf"),
    ],
)
def test_runs_that_conversations_do_not_fit(chat, settings, said):
    from harness.planning.plan import plan

    with pytest.raises(UserError, match=said):
        plan(load_catalog().find("801"), chat | settings, "cpu")


def test_a_checkpoint_of_another_tokenizers_data_is_refused(tmp_path, chat, monkeypatch):
    """The same sizes, other tokens: it would train, and mean nothing."""
    from dataclasses import replace

    from harness.planning.checkpoint_fits import check_fits
    from harness.run.checkpoints import Checkpoint
    from harness.run.writing import create

    e = with_changes(load_catalog().find("801"), data="chat")
    run = create(tmp_path, "before")
    run.freeze_experiment(with_changes(e, data="old"), "cpu", None)
    chosen = data_sets.find("chat")
    others = {"chat": chosen, "old": replace(chosen, name="old", tokenizer_sha256="other")}
    monkeypatch.setattr(data_sets, "find", lambda name, folder=tmp_path: others[name])
    found = Checkpoint(run.checkpoints / "iter_0000005", 5, 0, None)
    with pytest.raises(
        UserError,
        match="was trained on old, DATA=chat was made by another tokenizer\nprepare chat again with TOKENIZER=",
    ):
        check_fits(found, e)
    others["old"] = replace(chosen, name="old")
    check_fits(found, e)


def test_weights_without_a_tokenizer_refuse_more_tokens_than_they_know(chat):
    from harness.convert.weights import check_data

    model = load_catalog().find("801").model
    with pytest.raises(
        UserError,
        match="DATA=chat has a vocabulary of 257 tokens, gpt3-345m-tuned of 200\nprepare it again with TOKENIZER=the folder",
    ):
        check_data(model.model_copy(update={"vocab_size": 200}), None, data_sets.blend("chat"))
    check_data(model, None, data_sets.blend("chat"))
