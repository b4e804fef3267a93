"""Conversations: read from JSON Lines, checked, and cut into spans by a chat template.

A line is ``{"messages": [{"role": …, "content": …}, …]}``: an optional system message, then user and assistant in turn,
an answer last. Templates are Jinja, as Hugging Face keeps them; a tokenizer that has none gets ``simple_template``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import UserError, first_line

RULES = {
    "no JSON": "a line that is no JSON in UTF-8",
    "no messages": 'no "messages": a list of objects, each with a role and a content that is text',
    "roles": "roles other than an optional system, then user and assistant in turn",
    "no answer": "the last message is none of the assistant's, or an answer is empty",
    "template": "the chat template refuses it, or rewrites what came before an answer",
}
"""Why a conversation is skipped."""

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]
"""A chat template: messages, and whether the beginning of an answer follows them -> text."""


class Unfit(ValueError):
    """A conversation that cannot be used. ``rule``: which of RULES it breaks."""

    def __init__(self, rule: str) -> None:
        super().__init__(RULES[rule])
        self.rule = rule


@dataclass
class Skipped:
    """Lines that were no conversation: how many by rule, and the first one of each."""

    by_rule: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    def add(self, rule: str, line: int) -> None:
        self.by_rule[rule] += 1
        self.first.setdefault(rule, line)

    def lines(self) -> list[str]:
        """One sentence a rule."""
        return [f"{number:,} skipped, the first in line {self.first[rule]:,}: {RULES[rule]}"
                for rule, number in sorted(self.by_rule.items())]


def read_messages(line: bytes) -> list[Message]:
    """The messages in a line of JSON.

    Raises:
        Unfit: it is none, or its roles are in no order that can be learned from.
    """
    try:
        found = json.loads(line.decode("utf-8"))
    except ValueError:
        raise Unfit("no JSON") from None
    messages = found.get("messages") if isinstance(found, dict) else None
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise Unfit("no messages")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[n % 2] for n, role in enumerate(turns)):
        raise Unfit("roles")
    if roles[-1] != "assistant" or any(m["role"] == "assistant" and not m["content"].strip() for m in messages):
        raise Unfit("no answer")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _is_message(message: object) -> bool:
    if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
        return False
    try:
        message["content"].encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return True


def spans(messages: list[Message], render: Render) -> list[str]:
    """Text to read and text to answer, in turn: the even ones are given, the odd ones are to be learned.

    An answer begins where the template, asked for one, leaves off, and ends behind what closes the turn.

    Raises:
        Unfit: the template refuses the messages, or its text for some of them is not how its text for more begins.
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


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """The numbered lines of a file that are not blank.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"INPUT={path}: {error.strerror}") from None


def simple_template(end: str) -> str:
    """A chat template for tokenizers without one: ``User: …``, ``Assistant: …`` and ``end``, parted by empty lines."""
    return (
        "{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
        "{% if message.role == 'system' %}{{ message.content }}"
        "{% elif message.role == 'user' %}{{ 'User: ' + message.content }}"
        "{% else %}{{ 'Assistant: ' + message.content + " + json.dumps(end) + " }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
    )


def template_of(tokenizer: Path) -> Render:
    """The chat template of the tokenizer in the folder ``tokenizer``.

    Raises:
        UserError: it has none, or it cannot be opened.
    """
    from transformers import AutoTokenizer

    try:
        opened = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises what its readers raise
        raise UserError(f"{tokenizer}: {first_line(error)}") from None
    if not opened.chat_template:
        raise UserError(f"{tokenizer} has no chat template")
    return lambda messages, answer: opened.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)


def has_template(tokenizer: Path) -> bool:
    """Whether the tokenizer in the folder ``tokenizer`` brings a chat template."""
    if (tokenizer / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError):
        return False
