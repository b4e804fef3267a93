"""Reads conversations from JSON, and splits them into prompts and answers by a chat template.

A file is JSON Lines or one JSON array. A conversation is ``{"messages": [{"role": …, "content": …},
…]}``, or ShareGPT's ``{"conversations": [{"from": "human", "value": …}, …]}``: an optional system
message, then alternately user and assistant, with an answer last. Templates are Hugging Face's, in
Jinja; a tokenizer without one gets ``simple_template``.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import BinaryIO

from harness.data.documents import has_surrogate
from harness.errors import UserError, first_line
from harness.system.files import read_object

RULES = {
    "no JSON": "no JSON in UTF-8",
    "no messages": (
        'neither "messages" with role and content as text, nor "conversations" with from and value'
    ),
    "roles": "roles other than an optional system, then alternately user and assistant",
    "no answer": "the last message is not the assistant's, or an answer is empty",
    "template": "the chat template refuses it, or changes the text before an answer",
}
"""Rules by which conversations are skipped."""

_CHUNK_BYTES = 1 << 20
_SEPARATOR = re.compile(r"\s*(?:,|(?=\]))")
"""What must follow an item of an array: without it, ``12`` may be the beginning of ``123``."""

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]
"""A chat template: messages, and whether to append the beginning of an answer -> text."""


class Unfit(ValueError):
    """A conversation that cannot be used. ``rule``: the one of RULES that it breaks."""

    def __init__(self, rule: str) -> None:
        super().__init__(RULES[rule])
        self.rule = rule


@dataclass
class Skipped:
    """Lines, or items of an array, without a usable conversation: number and first one by rule."""

    by_rule: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    unit: str = "line"

    def add(self, rule: str, line: int) -> None:
        self.by_rule[rule] += 1
        self.first.setdefault(rule, line)

    def lines(self) -> list[str]:
        """A line of text for each rule."""
        return [
            f"{number:,} skipped, the first in {self.unit} {self.first[rule]:,}: {RULES[rule]}"
            for rule, number in sorted(self.by_rule.items())
        ]


_SPEAKERS = {"human": "user"} | dict.fromkeys(
    ("gpt", "chatgpt", "model", "bing", "bard"), "assistant"
)
"""Role in ShareGPT and related formats -> role in templates; tools are not supported."""
_LISTS = ("messages", "conversations", "conversation")
_SHAPES = (("role", "content"), ("from", "value"))
"""Keys of the messages; of the role and of the text."""


def read_messages(found: bytes | object) -> list[Message]:
    """The messages of a conversation, given as a line of JSON or as a parsed object.

    Raises:
        Unfit: it breaks one of RULES.
    """
    if isinstance(found, bytes):
        try:
            found = json.loads(found.decode("utf-8"))
        except (ValueError, RecursionError):
            raise Unfit("no JSON") from None
    messages = _messages(found) if isinstance(found, dict) else None
    if not messages:
        raise Unfit("no messages")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[n % 2] for n, role in enumerate(turns)):
        raise Unfit("roles")
    if roles[-1] != "assistant" or any(
        m["role"] == "assistant" and not m["content"].strip() for m in messages
    ):
        raise Unfit("no answer")
    return messages


def _messages(found: dict) -> list[Message] | None:
    for key, (who, what) in product(_LISTS, _SHAPES):
        said = found.get(key)
        if isinstance(said, list) and said and all(_is_message(each, who, what) for each in said):
            messages = [
                {"role": _SPEAKERS.get(each[who], each[who]), "content": each[what]}
                for each in said
            ]
            # ShareGPT's relatives may have the system message next to the conversation.
            own = who == "from" and messages[0]["role"] != "system"
            system = found.get("system") if own else None
            if isinstance(system, str) and system.strip() and not has_surrogate(system):
                messages.insert(0, {"role": "system", "content": system})
            return messages
    return None


def _is_message(message: object, who: str, what: str) -> bool:
    return (
        isinstance(message, dict)
        and isinstance(message.get(who), str)
        and isinstance(message.get(what), str)
        and not has_surrogate(message[what])
    )


def spans(messages: list[Message], render: Render) -> list[str]:
    """Prompts (even items) and answers (odd items), alternately.

    An answer begins where the template's text for a generation prompt ends. It includes the text
    that ends the turn.

    Raises:
        Unfit: the template refuses the messages, or its text for the first messages is not the
            beginning of its text for all.
    """
    found: list[str] = []
    done = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            asked, answered = render(messages[:turn], True), render(messages[: turn + 1], False)
        except Exception:  # a template can raise what it likes
            raise Unfit("template") from None
        if not asked.startswith(done) or not answered.startswith(asked) or answered == asked:
            raise Unfit("template")
        found += [asked[len(done) :], answered[len(asked) :]]
        done = answered
    return found


def conversations_of(path: Path, skipped: Skipped) -> Iterator[tuple[int, bytes | object]]:
    """The numbered lines of a file that are not blank, or the items of its JSON array.

    The file may be compressed with gzip.

    Args:
        skipped: gets the unit that is counted, line or item.

    Raises:
        UserError: it cannot be read, or is a truncated or damaged array.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
            file.seek(0)
            if start.startswith(b"["):
                skipped.unit = "item"
                yield from enumerate(_items(path, file), 1)
                return
            for number, line in enumerate(file, 1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    yield number, text
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"INPUT={path}: {getattr(error, 'strerror', None) or first_line(error)}"
        ) from None


def _items(path: Path, file: BinaryIO) -> Iterator[object]:
    """The items of a JSON array, of which only one is in memory at a time."""
    decoder = json.JSONDecoder()
    read = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
    text, number, size, at_end = "", 0, _CHUNK_BYTES, False

    def more() -> None:
        nonlocal text, at_end, size
        data = file.read(size)
        at_end = not data
        text += read(data, at_end)

    def damaged(what: str) -> UserError:
        near = " ".join(text[:60].split())
        return UserError(
            f"INPUT={path}: the JSON array {what} after {number:,} items"
            + (f": {near} …" if near else "")
        )

    while not text.lstrip():
        more()
    text = text.lstrip()[1:]
    while True:
        text = text.lstrip()
        while not text and not at_end:
            more()
            text = text.lstrip()
        if text.startswith("]"):
            text = text[1:].lstrip() + file.read(_CHUNK_BYTES).decode(errors="replace").lstrip()
            if text:
                raise damaged("ends, and more text follows")
            return
        try:
            item, end = decoder.raw_decode(text)
            behind = _SEPARATOR.match(text, end)
        except (ValueError, RecursionError):
            behind = None
        if behind is None:
            if at_end:
                raise damaged("is truncated or damaged")
            size *= 2  # an item longer than what was read is parsed again, so read ever more
            more()
            continue
        number += 1
        yield item
        text, size = text[behind.end() :], _CHUNK_BYTES


def simple_template(end: str) -> str:
    """A chat template for tokenizers without one: ``User: …`` and ``Assistant: …``, each answer
    followed by ``end``, with empty lines between messages."""
    return (
        "{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
        "{% if message.role == 'system' %}{{ message.content }}"
        "{% elif message.role == 'user' %}{{ 'User: ' + message.content }}"
        "{% else %}{{ 'Assistant: ' + message.content + "
        + json.dumps(end)
        + " }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
    )


def template_of(tokenizer: Path) -> Render:
    """The chat template of the tokenizer in the folder ``tokenizer``.

    Raises:
        UserError: it has none, or it cannot be opened.
    """
    from transformers import AutoTokenizer

    try:
        opened = AutoTokenizer.from_pretrained(
            tokenizer, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # transformers raises what its readers raise
        raise UserError(f"{tokenizer}: {first_line(error)}") from None
    if not opened.chat_template:
        raise UserError(f"{tokenizer} has no chat template")
    return lambda messages, answer: opened.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answer
    )


def has_template(tokenizer: Path) -> bool:
    """Whether the tokenizer in the folder ``tokenizer`` has a chat template."""
    if (tokenizer / "chat_template.jinja").is_file():
        return True
    try:
        return bool(read_object(tokenizer / "tokenizer_config.json").get("chat_template"))
    except ValueError:
        return False
