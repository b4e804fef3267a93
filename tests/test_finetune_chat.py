"""Conversations: what is one, what is answered in it, how they are packed, and the settings that tune on them."""

import gzip
import json
import random

import pytest

from harness.data.chat.conversations import Skipped, Unfit, conversations_of, read_messages, spans
from harness.errors import UserError
from harness.experiment import overrides
from harness.experiment.catalog import load_catalog
from harness.experiment.model import Lora
from harness.finetune.packing import pack

CATALOG = load_catalog()
LORA, SFT, MOE = CATALOG.find("802"), CATALOG.find("801"), CATALOG.find("631")


def line(*messages: tuple[str, str]) -> bytes:
    return json.dumps(
        {"messages": [{"role": role, "content": content} for role, content in messages]}
    ).encode()


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[1, 2]", "no messages"),
        (b'{"text": "no conversation"}', "no messages"),
        (b'{"messages": []}', "no messages"),
        (b'{"messages": [{"role": "user"}]}', "no messages"),
        (b'{"messages": [{"role": "user", "content": ["parts"]}]}', "no messages"),
        (
            b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}',
            "no messages",
        ),
        (line(("assistant", "hello")), "roles"),
        (line(("user", "a"), ("user", "b"), ("assistant", "c")), "roles"),
        (line(("user", "a"), ("system", "b"), ("assistant", "c")), "roles"),
        (line(("user", "a"), ("tool", "b")), "roles"),
        (line(("user", "a")), "no answer"),
        (line(("system", "a")), "no answer"),
        (line(("user", "a"), ("assistant", "b"), ("user", "c")), "no answer"),
        (line(("user", "a"), ("assistant", "  ")), "no answer"),
    ],
)
def test_what_is_no_conversation(broken, rule):
    with pytest.raises(Unfit) as caught:
        read_messages(broken)
    assert caught.value.rule == rule


QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("found", [
    {"messages": [QUESTION, ANSWER]}, {"conversations": [QUESTION, ANSWER]}, {"conversation": [QUESTION, ANSWER]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": "x"},
    {"conversations": [{"from": "user", "value": "q", "weight": 1}, {"from": "chatgpt", "value": "a"}]},
    {"messages": [{"from": "human", "value": "q"}, {"from": "assistant", "value": "a"}]},
    {"messages": [], "conversations": [{"from": "human", "value": "q"}, {"from": "model", "value": "a"}]},
])  # fmt: skip
def test_the_usual_shapes_of_a_conversation(found):
    assert read_messages(found) == read_messages(json.dumps(found).encode()) == [QUESTION, ANSWER]


def test_a_system_message_beside_sharegpts_conversation_comes_first():
    found = {
        "system": "be brief",
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    }
    assert read_messages(found) == [{"role": "system", "content": "be brief"}, QUESTION, ANSWER]
    found["conversations"].insert(0, {"from": "system", "value": "s"})
    assert read_messages(found)[0] == {"role": "system", "content": "s"}


@pytest.mark.parametrize(("found", "rule"), [
    ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "a"}]}, "no messages"),
    ({"conversations": "q"}, "no messages"), ([QUESTION, ANSWER], "no messages"), (None, "no messages"), (3.5, "no messages"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f"}]}, "roles"),
    ({"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]}, "roles"),
    ({"conversations": [{"from": "human", "value": "q"}]}, "no answer"),
    ({"conversations": [{"from": "human", "value": "q\udcff"}, {"from": "gpt", "value": "a"}]}, "no messages"),
])  # fmt: skip
def test_what_is_none_in_another_shape(found, rule):
    with pytest.raises(Unfit) as caught:
        read_messages(found)
    assert caught.value.rule == rule


ITEMS = [
    {"messages": [QUESTION, ANSWER]},
    3,
    "}],[",
    None,
    [1, [2]],
    {"a": 'åä 数 \u2028 \\ "'},
    {},
    {"long": "x" * 5000},
    12345,
    True,
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("written", [
    lambda: json.dumps(ITEMS).encode(), lambda: json.dumps(ITEMS, indent=2, ensure_ascii=False).encode(),
    lambda: b"\xef\xbb\xbf \n" + json.dumps(ITEMS, separators=(",", ":")).encode() + b"\n\n",
])  # fmt: skip
def test_an_array_is_read_item_by_item(tmp_path, monkeypatch, written, chunk):
    from harness.data.chat import conversations

    monkeypatch.setattr(conversations, "_CHUNK_BYTES", chunk)
    (tmp_path / "chat.json").write_bytes(written())
    skipped = Skipped()
    assert (
        list(conversations_of(tmp_path / "chat.json", skipped)) == [*enumerate(ITEMS, 1)]
        and skipped.unit == "item"
    )
    with gzip.open(tmp_path / "chat.json.gz", "wb") as packed:
        packed.write(written())
    assert len(list(conversations_of(tmp_path / "chat.json.gz", Skipped()))) == len(ITEMS)
    (tmp_path / "chat.json").write_bytes(b"[ ]")
    assert list(conversations_of(tmp_path / "chat.json", Skipped())) == []


@pytest.mark.parametrize(("damage", "said"), [
    (lambda whole: whole[:-1], "is truncated or damaged after 9 items: true"), (lambda whole: whole[:25], "is truncated or damaged after 0 items"),
    (lambda whole: whole.replace(b", 3,", b" 3,"), "after 0 items"), (lambda whole: whole.replace(b", 3,", b", nonsense,"), "after 1 items: nonsense"),
    (lambda whole: whole + b"\n[1]", r"ends, and more text follows after 10 items: \[1\]"), (lambda whole: b"[" * 100_000, "after 0 items"),
    (lambda whole: b"[", "after 0 items"),
])  # fmt: skip
def test_an_array_that_is_damaged_is_refused_with_the_place(tmp_path, damage, said):
    (tmp_path / "chat.json").write_bytes(damage(json.dumps(ITEMS).encode()))
    with pytest.raises(UserError, match=rf"INPUT=.*chat.json: the JSON array .*{said}"):
        list(conversations_of(tmp_path / "chat.json", Skipped()))


def test_lines_stay_lines(tmp_path):
    (tmp_path / "chat.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n \n\xff\n{"b"')
    skipped = Skipped()
    assert list(conversations_of(tmp_path / "chat.jsonl", skipped)) == [
        (1, b'{"a": 1}\n'),
        (4, b"\xff\n"),
        (5, b'{"b"'),
    ]
    assert skipped.unit == "line"
    (tmp_path / "chat.jsonl.gz").write_bytes(b"no gzip")
    for path in (tmp_path, tmp_path / "missing.jsonl", tmp_path / "chat.jsonl.gz"):
        with pytest.raises(UserError, match=f"INPUT={path}: "):
            list(conversations_of(path, Skipped()))


def test_more_keys_are_left_out():
    raw = b'{"id": 7, "messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]}'
    assert read_messages(raw) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def brackets(messages, answer: bool) -> str:
    return "".join(f"<{m['role']}>{m['content']}</>" for m in messages) + "<assistant>" * answer


def test_answers_begin_behind_their_header_and_end_with_the_turn():
    messages = read_messages(
        line(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    )
    found = spans(messages, brackets)
    assert found == ["<system>s</><user>q</><assistant>", "a</>", "<user>r</><assistant>", "b</>"]
    assert "".join(found) == brackets(messages, False)


def only_the_last(messages, answer: bool) -> str:
    return brackets(messages[-1:], answer)


def refuses(messages, answer: bool) -> str:
    raise ValueError("no system message, please")


@pytest.mark.parametrize("template", [only_the_last, refuses])
def test_templates_that_cannot_be_cut(template):
    messages = read_messages(
        line(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    )
    with pytest.raises(Unfit) as caught:
        spans(messages, template)
    assert caught.value.rule == "template"


def test_what_was_skipped_is_counted_and_found():
    skipped = Skipped()
    for number, rule in ((3, "roles"), (5, "no JSON"), (9, "roles")):
        skipped.add(rule, number)
    assert [said.partition(":")[0] for said in skipped.lines()] == [
        "1 skipped, the first in line 5",
        "2 skipped, the first in line 3",
    ]


@pytest.mark.parametrize("seed", range(20))
def test_packing_is_whole_and_close_to_the_fewest(seed):
    generator = random.Random(seed)
    room = generator.choice([8, 64, 500])
    lengths = [generator.randint(1, room) for _ in range(generator.randint(1, 300))]
    bins = pack(lengths, room)
    assert sorted(item for each in bins for item in each) == list(range(len(lengths)))
    assert all(0 < sum(lengths[item] for item in each) <= room for each in bins)
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // room) + 0.35 * len(lengths) + 1
    emptiest = sorted(room - sum(lengths[i] for i in each) for each in bins)[-2:]
    assert len(bins) < 2 or sum(emptiest) < 2 * room - min(lengths), (
        "two bins that would fit into one"
    )


def test_packing_fills_exactly_where_it_can():
    assert pack([5, 5, 3, 7, 2, 8], 10) == [[5, 4], [3, 2], [0, 1]]


def test_settings_change_the_rows_adapters():
    assert overrides.apply(LORA, {"LORA_RANK": "4"}).lora == Lora(rank=4, alpha=8.0), (
        "the scale stays"
    )
    assert overrides.apply(LORA, {"LORA_ALPHA": "16", "LORA_DROPOUT": "0.1"}).lora == Lora(
        rank=16, alpha=16.0, dropout=0.1
    )
    assert overrides.apply(
        SFT, {"LORA_RANK": "8", "LORA_TARGETS": "linear_qkv,linear_proj"}
    ).lora == Lora(rank=8, alpha=16.0, targets=("linear_qkv", "linear_proj"))
    assert overrides.apply(LORA, {"LORA_RANK": "0"}).lora is None
    same = overrides.apply(LORA, {"LORA_RANK": "16"})
    assert same == LORA and not same.overrides


@pytest.mark.parametrize(
    ("experiment", "settings", "said"),
    [
        (SFT, {"LORA_ALPHA": "16"}, "give LORA_RANK="),
        (LORA, {"LORA_RANK": "x"}, "LORA_RANK=x: expected a whole number"),
        (LORA, {"LORA_RANK": "0", "LORA_ALPHA": "3"}, "leave out LORA_ALPHA"),
        (LORA, {"LORA_ALPHA": "0"}, "above 0"),
        (LORA, {"LORA_ALPHA": "nan"}, "LORA_ALPHA=nan"),
        (LORA, {"LORA_DROPOUT": "1"}, "below 1"),
        (LORA, {"LORA_TARGETS": "linear_qvk"}, "linear_qkv"),
        (LORA, {"LORA_TARGETS": "linear_qkv linear_qkv"}, "one adapter"),
        (MOE, {"LORA_RANK": "8"}, "experts get no adapters"),
        (LORA, {"SHARDING": "fsdp_optim"}, "SHARDING=optim"),
        (LORA, {"OPTIMIZER": "muon"}, "OPTIMIZER=adam"),
    ],
)
def test_adapters_that_cannot_be_trained(experiment, settings, said):
    with pytest.raises(UserError, match=said):
        overrides.apply(experiment, settings)
