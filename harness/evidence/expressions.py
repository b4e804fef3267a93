"""Arithmetic over quantities: ``step_ms[401] / step_ms[408h]``. It is parsed, never executed.

Brackets hold an experiment as typed after ``make`` (``101``, ``121 CARD=h100-80gb``) or a row of
references.yaml (``h200-8gpu, 128``). Numbers, + - * /, min, max and median are allowed. Quantities
have units; different units cannot be added or compared.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from harness.errors import UserError, nearest

LONGEST = 800
"""Characters of an expression. A longer one could exhaust the parser's stack."""
GROUP = re.compile(r"([\w.-]+)\s*,\s*(.+)")
"""``GROUP, NAME[, VARIANT]`` in brackets: a row of references.yaml."""

_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "median": lambda *values: statistics.median(values),
}

Unit = tuple[tuple[str, int], ...]
"""Names of units with their powers, by name: (("GiB", 1), ("ms", -1)); empty for a pure number."""


@dataclass(frozen=True)
class Quantity:
    """One measured or computed number: ``step_ms`` of ``408h``."""

    name: str
    of: str
    """What stands in its brackets."""

    @property
    def names_reference(self) -> bool:
        """Whether it names a row of references.yaml, not an experiment."""
        return bool(GROUP.fullmatch(self.of))

    def __str__(self) -> str:
        return f"{self.name}[{self.of}]"


@dataclass(frozen=True)
class Operation:
    """An operator or a function over numbers, quantities and other operations."""

    function: Callable[..., float]
    operands: tuple[Node, ...]
    text: str

    def __str__(self) -> str:
        return self.text


Node = float | Quantity | Operation


@dataclass(frozen=True)
class Expression:
    """A parsed expression."""

    text: str
    root: Node

    @cached_property
    def quantities(self) -> tuple[Quantity, ...]:
        """The quantities in it, each once, in the order of the text."""
        return tuple(dict.fromkeys(_quantities(self.root)))

    def unit(self, unit_of: Callable[[str], Unit]) -> Unit:
        """The unit of its value. Raises UserError where units are mixed."""
        try:
            return _unit(self.root, unit_of)
        except _MixedUnits as error:
            raise UserError(f"{self.text}: mixes units: {error}") from None

    def value(self, value_of: Callable[[Quantity], float]) -> float:
        """Its value, given those of its quantities. Raises UserError on a division by zero."""
        try:
            return _value(self.root, value_of)
        except ZeroDivisionError:
            raise UserError(f"{self.text}: divides by zero") from None


def parse(text: str) -> Expression:
    """Parse an expression.

    Raises:
        UserError: it is no arithmetic over quantities.
    """
    rows: list[str] = []

    def numbered(row: re.Match[str]) -> str:
        rows.append(row[1].strip())
        return f"[{len(rows) - 1}]"

    try:
        if len(text) > LONGEST:
            raise SyntaxError(f"longer than {LONGEST} characters")
        tree = ast.parse(re.sub(r"\[([^\[\]]*)\]", numbered, text.strip()), mode="eval").body
        return Expression(text, _node(tree, rows))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = f" ({error.msg})" if isinstance(error, SyntaxError) else ""
        raise UserError(
            f"{text}: no arithmetic over quantities such as step_ms[401] / step_ms[408]{why}"
        ) from None


def spell(unit: Unit) -> str:
    """The text of a unit: ``GiB``, ``GiB/ms``; ``1`` for a pure number."""
    above = " ".join(f"{name}{f'^{power}' * (power > 1)}" for name, power in unit if power > 0)
    below = " ".join(f"{name}{f'^{-power}' * (power < -1)}" for name, power in unit if power < 0)
    return (above or "1") + (f"/{below}" if below else "")


class _MixedUnits(Exception):
    """Two operands are in different units."""


def _node(tree: ast.expr, rows: list[str]) -> Node:
    """``tree`` with indices of ``rows``. Raises SyntaxError at what is not allowed."""
    match tree:
        case ast.Constant(int() | float() as number) if not isinstance(
            number, bool
        ) and math.isfinite(number):
            return float(number)
        case ast.Subscript(ast.Name(name), ast.Constant(int(row))):
            return Quantity(name, rows[row])
        case ast.UnaryOp(ast.USub(), operand):
            function, operands = operator.neg, [operand]
        case ast.BinOp(left, operation, right) if type(operation) in _OPERATORS:
            function, operands = _OPERATORS[type(operation)], [left, right]
        case ast.Call(ast.Name(name), [_, *_] as operands, []):
            if name not in _FUNCTIONS:
                raise SyntaxError(f"no function {name}; {nearest(name, _FUNCTIONS)}")
            function = _FUNCTIONS[name]
        case _:
            raise SyntaxError(f"cannot read {ast.unparse(tree)!r}")
    text = re.sub(r"\[(\d+)\]", lambda index: f"[{rows[int(index[1])]}]", ast.unparse(tree))
    return Operation(function, tuple(_node(operand, rows) for operand in operands), text)


def _quantities(node: Node) -> Iterator[Quantity]:
    if isinstance(node, Quantity):
        yield node
    elif isinstance(node, Operation):
        for operand in node.operands:
            yield from _quantities(operand)


def _value(node: Node, value_of: Callable[[Quantity], float]) -> float:
    if isinstance(node, Operation):
        return node.function(*(_value(operand, value_of) for operand in node.operands))
    return value_of(node) if isinstance(node, Quantity) else node


def _unit(node: Node, unit_of: Callable[[str], Unit]) -> Unit:
    if not isinstance(node, Operation):
        return unit_of(node.name) if isinstance(node, Quantity) else ()
    first, *others = (_unit(operand, unit_of) for operand in node.operands)
    if node.function in (operator.mul, operator.truediv):
        return _product(first, others[0], 1 if node.function is operator.mul else -1)
    for operand, unit in zip(node.operands[1:], others, strict=True):
        if unit != first:
            raise _MixedUnits(
                f"{node.operands[0]} is in {spell(first)}, {operand} in {spell(unit)}"
            )
    return first


def _product(a: Unit, b: Unit, sign: int) -> Unit:
    powers = dict(a)
    for name, power in b:
        powers[name] = powers.get(name, 0) + sign * power
    return tuple(sorted((name, power) for name, power in powers.items() if power))
