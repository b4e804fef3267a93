"""Conversations: what is one, what is answered in it, how they are packed, and the settings that tune on them."""

import json
import random

import pytest

from harness.data.chat.conversations import Skipped, Unfit, read_messages, spans
from harness.errors import UserError
from harness.experiment import overrides
from harness.experiment.catalog import Lora, load_catalog
from harness.finetune.packing import pack

CATALOG = load_catalog()
LORA, SFT, MOE = CATALOG.find("802"), CATALOG.find("801"), CATALOG.find("631")


def line(*messages: tuple[str, str]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]}).encode()


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
        (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}', "no messages"),
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


def test_more_keys_are_left_out():
    raw = b'{"id": 7, "messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]}'
    assert read_messages(raw) == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def brackets(messages, answer: bool) -> str:
    return "".join(f"<{m['role']}>{m['content']}</>" for m in messages) + "<assistant>" * answer


def test_answers_begin_behind_their_header_and_end_with_the_turn():
    messages = read_messages(line(("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")))
    found = spans(messages, brackets)
    assert found == ["<system>s</><user>q</><assistant>", "a</>", "<user>r</><assistant>", "b</>"]
    assert "".join(found) == brackets(messages, False)


def only_the_last(messages, answer: bool) -> str:
    return brackets(messages[-1:], answer)


def refuses(messages, answer: bool) -> str:
    raise ValueError("no system message, please")


@pytest.mark.parametrize("template", [only_the_last, refuses])
def test_templates_that_cannot_be_cut(template):
    messages = read_messages(line(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")))
    with pytest.raises(Unfit) as caught:
        spans(messages, template)
    assert caught.value.rule == "template"


def test_what_was_skipped_is_counted_and_found():
    skipped = Skipped()
    for number, rule in ((3, "roles"), (5, "no JSON"), (9, "roles")):
        skipped.add(rule, number)
    assert [said.partition(":")[0] for said in skipped.lines()] == ["1 skipped, the first in line 5", "2 skipped, the first in line 3"]


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
    assert len(bins) < 2 or sum(emptiest) < 2 * room - min(lengths), "two bins that would fit into one"


def test_packing_fills_exactly_where_it_can():
    assert pack([5, 5, 3, 7, 2, 8], 10) == [[5, 4], [3, 2], [0, 1]]


def test_settings_change_the_rows_adapters():
    assert overrides.apply(LORA, {"LORA_RANK": "4"}).lora == Lora(rank=4, alpha=8.0), "the scale stays"
    assert overrides.apply(LORA, {"LORA_ALPHA": "16", "LORA_DROPOUT": "0.1"}).lora == Lora(rank=16, alpha=16.0, dropout=0.1)
    assert overrides.apply(SFT, {"LORA_RANK": "8", "LORA_TARGETS": "linear_qkv,linear_proj"}).lora == Lora(
        rank=8, alpha=16.0, targets=("linear_qkv", "linear_proj"))
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
