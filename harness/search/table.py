"""Experiments that differ in a few fields, as columns, and formulas worked out over all of them.

A formula of harness/predict or a rule of harness/experiment is asked once for each combination of
the fields that it reads, by the same code as for one experiment: which fields these are is seen
while it runs. What it says is spread over all rows with these fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from harness.experiment.experiment import Experiment

Indices = np.ndarray
LARGEST_LOOKUP = 2**22
"""Combinations of fields that are told apart by an array, which is faster than sorting them."""


class Column(NamedTuple):
    """A field that differs: for each row the place of its value among ``values``."""

    codes: np.ndarray
    values: Sequence[Any]

    def take(self, rows: Indices) -> Column:
        return Column(self.codes[rows], self.values)


class WorkedOut(NamedTuple):
    """What a function says of rows."""

    told: np.ndarray
    """A row for each number, a column for each combination of fields."""
    which: np.ndarray
    """The combination of each row of the table."""
    like: Any
    """What it says of one, for the shape."""
    read: frozenset[str]
    """The differing fields that it reads."""

    def take(self, rows: Indices) -> WorkedOut:
        return self._replace(which=self.which[rows])

    def spread(self, rows: Indices | None = None) -> Any:
        """Arrays over rows, all or some; a number where it is the same for all combinations."""
        which = self.which if rows is None else self.which[rows]
        arrays = (each[which] if (each != each[0]).any() else each[0].item() for each in self.told)
        return _shaped(self.like, arrays)


class Row:
    """Stands for an experiment, and notes which differing fields it was asked for."""

    def __init__(self, table: Table, row: int) -> None:
        self.__dict__.update(table.same)
        self._table, self._row, self.read = table, row, set()

    def __getattr__(self, name: str) -> Any:
        if column := self._table.columns.get(name):
            self.read.add(name)
            value = column.values[column.codes[self._row]]
        else:
            value = getattr(Experiment, name).fget(self)  # a property
        self.__dict__[name] = value
        return value

    def model_copy(self, update: Mapping[str, Any]) -> Row:
        """A row with other values, whose reads are this one's."""
        changed = Row(self._table, self._row)
        changed.__dict__.update(update)
        changed.read = self.read
        return changed


class Rows(Row):
    """Stands for experiments that agree in the fields it is asked for."""

    def __init__(self, table: Table, rows: Indices) -> None:
        super().__init__(table, rows[0])
        self.rows = rows

    def model_copy(self, update: Mapping[str, Any]) -> Rows:
        """Rows with other values, whose reads are these ones'."""
        table = self._table
        kept = {name: table.columns[name] for name in table.columns.keys() - update.keys()}
        changed = Table(table.base.model_copy(update=update), kept).take(self.rows)
        rows = Rows(changed, np.arange(len(changed)))
        rows.read = self.read
        return rows

    def each(self, name: str, function: Callable[[Any], Any]) -> Any:
        """As ``Table.each``, of these rows; ``name`` identifies the function."""
        if name not in self._table.known:
            self._table.known[name] = self._table.worked_out(function)
        return self._table.known[name].spread(self.rows)

    def knows(self, name: str) -> bool:
        """Whether the function with this name was asked."""
        return name in self._table.known

    def rename(self, name: str, other: str) -> None:
        """Keep what the function ``name`` said under ``other``."""
        self._table.known[other] = self._table.known.pop(name)

    def array(self, name: str) -> np.ndarray:
        """A differing field of each."""
        return self._table.array(name)[self.rows]


class Table:
    """Experiments like ``base`` but for ``columns``."""

    def __init__(
        self,
        base: Experiment,
        columns: Mapping[str, Column],
        known: Mapping[str, WorkedOut] | None = None,
    ) -> None:
        self.base, self.columns = base, dict(columns)
        self.known = dict(known or {})
        """What functions with a name said."""
        self.same = {
            name: getattr(base, name) for name in Experiment.model_fields if name not in columns
        }
        self.size = len(next(iter(self.columns.values())).codes)

    def __len__(self) -> int:
        return self.size

    def array(self, name: str) -> np.ndarray:
        """A field of every row."""
        if column := self.columns.get(name):
            return np.array(column.values)[column.codes]
        return np.full(self.size, getattr(self.base, name))

    def take(self, rows: Indices) -> Table:
        """Some of the rows, by number or by mask."""
        columns = {name: column.take(rows) for name, column in self.columns.items()}
        known = {name: worked_out.take(rows) for name, worked_out in self.known.items()}
        return Table(self.base, columns, known)

    def expanded(self, choice: Mapping[str, Sequence[Any]]) -> Table:
        """Every row with every value that its fields may have together."""
        number = len(next(iter(choice.values())))
        every = self.take(np.repeat(np.arange(self.size), number))
        chosen = {name: _column(choice[name], self.size) for name in choice}
        known = {
            name: worked_out
            for name, worked_out in every.known.items()
            if worked_out.read.isdisjoint(choice)
        }
        return Table(self.base, every.columns | chosen, known)

    def with_derived(self, names: Iterable[str]) -> Table:
        """A copy that has these properties of an experiment, whole numbers, as columns."""
        derived = {}
        for name in names:
            whole = np.broadcast_to(self.each(attrgetter(name)), self.size).astype(int)
            values, codes = np.unique(whole, return_inverse=True)
            derived[name] = Column(codes, values.tolist())
        return Table(self.base, self.columns | derived, self.known)

    def each(self, function: Callable[[Any], Any]) -> Any:
        """What ``function`` says of each row: arrays in place of numbers.

        It must say as many numbers of each, in the same tuples and dataclasses.
        """
        return self.worked_out(function).spread()

    def worked_out(self, function: Callable[[Any], Any]) -> WorkedOut:
        """What ``function`` says of each combination of the fields that it reads."""
        read: set[str] = set()
        while True:
            distinct, which = self._combinations(read)
            told, before = [], len(read)
            for row in distinct:
                like = Row(self, row)
                said = function(like)
                told.append(list(_flat(said)))
                read |= like.read
                if len(read) > before:
                    break
            else:
                told = np.array(told, dtype=float).T
                return WorkedOut(told, which, said, frozenset(read))

    def true(self, function: Callable[[Any], bool]) -> np.ndarray:
        """Of which rows ``function`` is true: a mask."""
        if not self.size:
            return np.zeros(0, dtype=bool)
        return np.broadcast_to(self.each(function), self.size).astype(bool)

    def together(self, function: Callable[[Rows], Any]) -> Any:
        """Arrays that ``function`` works out for all rows that agree in what it reads itself.

        Differing fields that it does not read go in by ``Rows.each`` and ``Rows.array``.
        """
        read: set[str] = set()
        while True:
            distinct, which = self._combinations(read)
            order = np.argsort(which, kind="stable")
            groups = np.split(order, np.searchsorted(which[order], np.arange(1, len(distinct))))
            found, before = [], len(read)
            for rows in groups:
                like = Rows(self, rows)
                said = function(like)
                found.append((rows, list(_flat(said))))
                read |= like.read
                if len(read) > before:
                    break
            else:
                break
        whole = np.empty((len(found[0][1]), self.size))
        for rows, arrays in found:
            for i, array in enumerate(arrays):
                whole[i, rows] = array
        return _shaped(said, iter(whole))

    def which(self, names: Iterable[str]) -> np.ndarray:
        """A number for each row: the same where they agree in the columns ``names``."""
        return self._combinations(names)[1]

    def _combinations(self, names: Iterable[str]) -> tuple[Indices, np.ndarray]:
        """A row for each combination of the columns ``names``, and which of them each row has."""
        key, size = np.zeros(self.size, dtype=np.int64), 1
        for name in sorted(names):
            codes, values = self.columns[name]
            key *= len(values)
            key += codes
            size *= len(values)
        if size > LARGEST_LOOKUP:
            _, distinct, which = np.unique(key, return_index=True, return_inverse=True)
            return distinct, which
        rows = np.full(size, -1)
        rows[key] = np.arange(self.size)
        places = np.cumsum(rows >= 0) - 1
        return rows[rows >= 0], places[key]


def _column(values: Sequence[Any], times: int) -> Column:
    """All ``values``, so many times one after the other."""
    distinct = list(dict.fromkeys(values))
    codes = np.array([distinct.index(value) for value in values], dtype=np.int32)
    return Column(np.tile(codes, times), distinct)


def _flat(said: Any) -> Iterator[Any]:
    """The numbers or arrays in tuples and dataclasses."""
    if isinstance(said, float | int | np.ndarray | np.generic):
        yield said
        return
    for part in said if isinstance(said, tuple) else vars(said).values():
        yield from _flat(part)


def _shaped(like: Any, flat: Iterator[Any]) -> Any:
    """``flat`` in the tuples and dataclasses of ``like``."""
    if isinstance(like, float | int | np.ndarray | np.generic):
        return next(flat)
    if not isinstance(like, tuple):
        return type(like)(*(_shaped(part, flat) for part in vars(like).values()))
    parts = [_shaped(part, flat) for part in like]
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
