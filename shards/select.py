"""`data.where`: choose samples by what their index records say, without packing again.

    "duration_s >= 2 and short_side >= 128 and motion > 1.5"      "label in ['archery', 'bowling'] or group == 'tv'"

The expression is Python's grammar for comparisons, arithmetic, `and`, `or`, `not` and `in` over the fields below, and
nothing else of Python: it is parsed, checked and computed on whole columns, never executed. What it chooses is a bit
per sample; the hash of those bits goes into a run's cursor, so that a resumed run draws from the same samples.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import operator
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.layout import RECORD_DTYPE, Records, group_number

ROWS_AT_A_TIME = 1 << 20

Column = Any
"""A numpy array of one value per row, or a plain value."""

FIELDS: dict[str, Callable[[Records], Column]] = {
    "duration_s": lambda records: records["num_frames"] / np.maximum(records["rate"], 1e-6),
    "num_frames": lambda records: records["num_frames"].astype(np.int64),
    "rate": lambda records: records["rate"].astype(np.float64),
    "width": lambda records: records["width"].astype(np.int64),
    "height": lambda records: records["height"].astype(np.int64),
    "short_side": lambda records: np.minimum(records["width"], records["height"]).astype(np.int64),
    "size_bytes": lambda records: records["size"].astype(np.int64),
    "motion": lambda records: records["motion"].astype(np.float64),
    "grid": lambda records: records["grid"].astype(np.int64),
    "label": lambda records: records["label"].astype(np.int64),
    "group": lambda records: records["group"].astype(np.int64),
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: lambda left, right: left / right,
}


@dataclass(frozen=True)
class Selection:
    """The chosen samples of a split, ascending."""

    numbers: NDArray[np.uint32]
    """Sample numbers; backed by an unnamed file, so that millions of them are no memory of this process."""
    hash: str
    """sha256 of one bit per sample of the split."""

    def num_below(self, sample: int) -> int:
        """How many of the chosen samples have a lower number."""
        return int(np.searchsorted(self.numbers, sample))

    def hash_of(self, num_rows: int) -> str:
        """The hash over the first rows alone: what it was before the split grew."""
        digest = hashlib.sha256()
        for first in range(0, num_rows, ROWS_AT_A_TIME):
            chosen = np.zeros(min(ROWS_AT_A_TIME, num_rows - first), np.bool_)
            chosen[self.numbers[self.num_below(first) : self.num_below(first + len(chosen))] - first] = True
            digest.update(np.packbits(chosen).tobytes())
        return digest.hexdigest()


def select(records: Records, where: str, labels: Sequence[str], shards: Sequence[int] | None = None) -> Selection:
    """Apply an expression (if it is not empty) to all records of a split, and keep to some tars if they are given.

    Raises UserError if it is no expression, or chooses nothing.
    """
    condition = Condition(where, labels) if where else None
    digest = hashlib.sha256()
    with tempfile.TemporaryFile() as file:
        count = 0
        for first in range(0, len(records), ROWS_AT_A_TIME):
            rows = records[first : first + ROWS_AT_A_TIME]
            chosen = np.ones(len(rows), np.bool_) if shards is None else np.isin(rows["shard"], shards)
            if condition is not None:
                chosen &= condition.holds(rows)
            digest.update(np.packbits(chosen).tobytes())
            numbers = (np.flatnonzero(chosen) + first).astype(np.uint32)
            file.write(numbers.tobytes())
            count += len(numbers)
        file.flush()
        if not count:
            raise UserError(f"data.where is {where!r}; it chooses none of {len(records)} samples: loosen it")
        return Selection(np.memmap(file, np.uint32, "r", shape=(count,)), digest.hexdigest())


class Condition:
    """A checked expression over record fields."""

    def __init__(self, text: str, labels: Sequence[str]) -> None:
        """Raises UserError, naming the nearest field, if the text says anything that is not allowed."""
        self._text = text
        self._numbers = {label: number for number, label in enumerate(labels)}
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError) as error:
            raise self._refused(f'be a condition like "duration_s >= 2" ({error.args[0]})') from error
        except (RecursionError, MemoryError) as error:  # what the parser says of thousands of signs or sums
            raise self._refused("be so short that it can be computed") from error
        try:
            trial = self._value(self._tree, np.zeros(1, dtype=RECORD_DTYPE))
        except (ArithmeticError, RecursionError) as error:
            raise self._refused(f"hold numbers that can be computed with ({error})") from error
        if not (isinstance(trial, np.ndarray) and cast("NDArray[Any]", trial).dtype == np.bool_):
            raise self._refused("be true or false for each sample: compare a field with a value")

    def holds(self, records: Records) -> NDArray[np.bool_]:
        """Whether it holds, for each record."""
        return np.asarray(self._value(self._tree, records), dtype=np.bool_)

    def _value(self, node: ast.expr, records: Records) -> Column:
        match node:
            case ast.BoolOp(op=op, values=values):
                combine = np.logical_and if isinstance(op, ast.And) else np.logical_or
                return combine.reduce([self._truth(value, records) for value in values])
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return np.logical_not(self._truth(operand, records))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._number(operand, records)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                with np.errstate(divide="ignore", invalid="ignore"):
                    return _ARITHMETIC[type(op)](self._number(left, records), self._number(right, records))
            case ast.Compare():
                return np.logical_and.reduce(list(self._comparisons(node, records)))
            case ast.Name(id=name):
                if name not in FIELDS:
                    nearest = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)[0]
                    raise self._refused(f"use fields of the index ({', '.join(FIELDS)}), and {name!r} is none", nearest)
                return FIELDS[name](records)
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return value
            case _:
                raise self._refused(f"hold comparisons and arithmetic only, and {ast.unparse(node)!r} is neither")

    def _truth(self, node: ast.expr, records: Records) -> Column:
        value = self._value(node, records)
        if not (isinstance(value, np.ndarray) and cast("NDArray[Any]", value).dtype == np.bool_):
            raise self._refused(f"join comparisons, and {ast.unparse(node)!r} is none")
        return cast("Column", value)

    def _number(self, node: ast.expr, records: Records) -> Column:
        if isinstance(node, ast.Name) and node.id in ("label", "group"):
            raise self._refused(f"compare {node.id} with a name by ==, != or in")
        value = self._value(node, records)
        if isinstance(value, np.ndarray) and cast("NDArray[Any]", value).dtype == np.bool_:
            raise self._refused(f"compute with numbers, and {ast.unparse(node)!r} is a comparison")
        return cast("Column", value)

    def _comparisons(self, node: ast.Compare, records: Records) -> Iterator[Column]:
        sides = [node.left, *node.comparators]
        for left, op, right in zip(sides, node.ops, sides[1:], strict=False):
            named = isinstance(left, ast.Name) and left.id in ("label", "group")
            if isinstance(op, ast.In | ast.NotIn) and isinstance(right, ast.List | ast.Tuple):
                values = [self._constant(left, item) for item in right.elts]
                found = np.isin(self._value(left, records), values)
                yield found if isinstance(op, ast.In) else np.logical_not(found)
            elif named and isinstance(op, ast.Eq | ast.NotEq):
                yield _COMPARISONS[type(op)](self._value(left, records), self._constant(left, right))
            elif type(op) in _COMPARISONS and not named:
                yield _COMPARISONS[type(op)](self._number(left, records), self._number(right, records))
            else:
                raise self._refused(f"compare with <, <=, >, >=, ==, != or in [...], unlike {ast.unparse(node)!r}")

    def _constant(self, field: ast.expr, node: ast.expr) -> int | float:
        """A plain value to compare a field with; names of labels and groups become their numbers."""
        value = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
        name = field.id if isinstance(field, ast.Name) else ""
        if name == "label":
            if str(value) in self._numbers:
                return self._numbers[str(value)]
            nearest = difflib.get_close_matches(str(value), self._numbers, n=1, cutoff=0.0)
            raise self._refused(f"name labels of the data set, and {value!r} is none", *nearest)
        if name == "group" and isinstance(value, str):
            return group_number(value)
        if isinstance(value, int | float) and name != "group":
            return value
        raise self._refused(f"compare {ast.unparse(field)} with plain values, and {ast.unparse(node)!r} is none")

    def _refused(self, rule: str, *nearest: str) -> UserError:
        remedy = f"did you mean {nearest[0]!r}?" if nearest else "see `tubelet config` and the README"
        return UserError(f"data.where is {self._text!r}; it must {rule}: {remedy}")
