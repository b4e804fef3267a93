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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from harness.errors import UserError, nearest

LONGEST = 800
"""Characters of an expression. A longer one could exhaust the parser's stack."""
GROUP = re.compile(r"([\w.-]+)\s*,\s*(.+)")
"""``GROUP, NAME[, VARIANT]`` in brackets: a row of references.yaml."""

_OPERATORS = {
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
class Expression:
    """A parsed expression."""

    text: str
    _tree: ast.expr
    _rows: tuple[str, ...]

    @cached_property
    def quantities(self) -> tuple[Quantity, ...]:
        """The quantities in it, each once, in the order of the text."""
        found = [node for node in ast.walk(self._tree) if isinstance(node, ast.Subscript)]
        return tuple(
            dict.fromkeys(
                self._quantity(node) for node in sorted(found, key=lambda node: node.col_offset)
            )
        )

    def unit(self, unit_of: Callable[[str], Unit]) -> Unit:
        """The unit of its value. Raises UserError where units are mixed."""
        return self._unit(self._tree, unit_of)

    def value(self, value_of: Callable[[Quantity], float]) -> float:
        """Its value, given those of its quantities. Raises UserError on a division by zero."""
        try:
            return self._value(self._tree, value_of)
        except ZeroDivisionError:
            raise UserError(f"{self.text}: divides by zero") from None

    def _quantity(self, node: ast.Subscript) -> Quantity:
        return Quantity(node.value.id, self._rows[node.slice.value])

    def _unit(self, node: ast.expr, unit_of: Callable[[str], Unit]) -> Unit:
        match node:
            case ast.Subscript():
                return unit_of(node.value.id)
            case ast.UnaryOp():
                return self._unit(node.operand, unit_of)
            case ast.BinOp(left, ast.Mult() | ast.Div() as operation, right):
                sign = 1 if isinstance(operation, ast.Mult) else -1
                return _product(self._unit(left, unit_of), self._unit(right, unit_of), sign)
            case ast.BinOp(left, _, right):
                return self._same([left, right], unit_of)
            case ast.Call():
                return self._same(node.args, unit_of)
        return ()

    def _same(self, nodes: list[ast.expr], unit_of: Callable[[str], Unit]) -> Unit:
        units = [self._unit(node, unit_of) for node in nodes]
        for node, unit in zip(nodes, units, strict=True):
            if unit != units[0]:
                one, other = self._text(nodes[0]), self._text(node)
                raise UserError(
                    f"{self.text}: mixes units: {one} is in {spell(units[0])}, {other} in"
                    f" {spell(unit)}"
                )
        return units[0]

    def _text(self, node: ast.expr) -> str:
        return re.sub(
            r"\[(\d+)\]", lambda index: f"[{self._rows[int(index[1])]}]", ast.unparse(node)
        )

    def _value(self, node: ast.expr, value_of: Callable[[Quantity], float]) -> float:
        match node:
            case ast.Constant(number):
                return float(number)
            case ast.Subscript():
                return value_of(self._quantity(node))
            case ast.UnaryOp():
                return -self._value(node.operand, value_of)
            case ast.BinOp(left, operation, right):
                return _OPERATORS[type(operation)](
                    self._value(left, value_of), self._value(right, value_of)
                )
            case ast.Call(ast.Name(function), arguments):
                return _FUNCTIONS[function](
                    *(self._value(argument, value_of) for argument in arguments)
                )
        raise AssertionError(node)


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
        _check(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = f" ({error.msg})" if isinstance(error, SyntaxError) else ""
        raise UserError(
            f"{text}: no arithmetic over quantities such as step_ms[401] / step_ms[408]{why}"
        ) from None
    return Expression(text, tree, tuple(rows))


def spell(unit: Unit) -> str:
    """The text of a unit: ``GiB``, ``GiB/ms``; ``1`` for a pure number."""
    above = " ".join(f"{name}{f'^{power}' * (power > 1)}" for name, power in unit if power > 0)
    below = " ".join(f"{name}{f'^{-power}' * (power < -1)}" for name, power in unit if power < 0)
    return (above or "1") + (f"/{below}" if below else "")


def _check(node: ast.expr) -> None:
    """Raise SyntaxError at the first node that is not allowed."""
    match node:
        case ast.Constant(int() | float() as number) if not isinstance(
            number, bool
        ) and math.isfinite(number):
            return
        case ast.Subscript(ast.Name(), ast.Constant(int())):
            return
        case ast.UnaryOp(ast.USub(), operand):
            _check(operand)
            return
        case ast.BinOp(left, operation, right) if type(operation) in _OPERATORS:
            _check(left)
            _check(right)
            return
        case ast.Call(ast.Name(function), [_, *_] as arguments, []):
            if function not in _FUNCTIONS:
                raise SyntaxError(f"no function {function}; {nearest(function, _FUNCTIONS)}")
            for argument in arguments:
                _check(argument)
            return
    raise SyntaxError(f"cannot read {ast.unparse(node)!r}")


def _product(a: Unit, b: Unit, sign: int) -> Unit:
    powers = dict(a)
    for name, power in b:
        powers[name] = powers.get(name, 0) + sign * power
    return tuple(sorted((name, power) for name, power in powers.items() if power))
