"""What a selection ranks by: an expression over the score columns, or a random order.

    distance                    the smallest distance to the decision boundary (the default)
    |margin|, abs(margin)       the smallest margin, right or wrong
    -loss                       the largest loss
    distance + 0.1 * entropy    numbers, columns, unary -, + - * /, abs() and parentheses
    random, random:7            a random order with seed 0, 7

The samples with the smallest values are selected.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dynams_stream import schema
from dynams_stream.errors import UsageError

LONGEST_TEXT = 200
"""Characters a strategy may have; it also bounds how deep an expression nests."""
_BARS = re.compile(r"\|([^|]+)\|")
_RANDOM = re.compile(r"random(?::(\d{1,20}))?")


@dataclass(frozen=True)
class Strategy:
    """A ranking of samples, smallest first; make one with `Strategy.parse`.

    Attributes:
        text: canonical text; equal rankings written with other spaces or parentheses share it.
        columns: the score columns it needs, in the order of `schema.SCORE_COLUMNS`; none for a random order.
        seed: seed of a random order; None for an expression.
    """

    text: str
    columns: tuple[str, ...]
    seed: int | None = None

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Read a strategy as a user writes it. Nothing in it is ever executed.

        Raises:
            UsageError: for anything but the grammar above; names the columns allowed.
        """
        stripped = text.strip()
        if len(stripped) > LONGEST_TEXT:
            raise UsageError(f"a strategy has at most {LONGEST_TEXT} characters; got {len(stripped)}")
        random = _RANDOM.fullmatch(stripped)
        if random:
            seed = int(random[1] or 0)
            if seed >= 2**64:
                raise UsageError(f"the seed of a random strategy is below 2**64; got {seed}")
            return cls(text=f"random:{seed}", columns=(), seed=seed)
        try:
            tree = ast.parse(_BARS.sub(r"abs(\1)", stripped), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise _refused(text, str(error)) from error
        used = _columns_of(tree, text)
        if not used:
            raise _refused(text, "it names no score column")
        return cls(text=ast.unparse(tree), columns=tuple(name for name in schema.SCORE_COLUMNS if name in used))

    @cached_property
    def _tree(self) -> ast.expr:
        return ast.parse(self.text, mode="eval").body

    def evaluate(self, columns: Mapping[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """The value of each sample, float32.

        Args:
            columns: float32 arrays of one length for all of `self.columns`; NaN where there is no score.

        A bare column comes back as it is; everything else is computed in float64 and rounded once. Division by zero
        gives an infinity or NaN; NaN means "not scored".

        Raises:
            UsageError: for a random order, which has no expression.
        """
        if self.seed is not None:
            raise UsageError(f"strategy {self.text!r} is a random order; it has no expression to evaluate")
        if isinstance(self._tree, ast.Name):
            return columns[self._tree.id]
        with np.errstate(all="ignore"):
            return np.asarray(_value(self._tree, columns)).astype(np.float32)


def _columns_of(node: ast.expr, text: str) -> set[str]:
    """The columns in an expression, after checking that it holds nothing else than the grammar."""
    match node:
        case ast.Name(id=name):
            if name in schema.SCORE_COLUMNS:
                return {name}
            raise _refused(text, f"there is no score column {name!r}")
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if not math.isfinite(value):
                raise _refused(text, f"{ast.unparse(node)} is not a finite number")
            return set()
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _columns_of(operand, text)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
            return _columns_of(left, text) | _columns_of(right, text)
        case ast.Call(func=ast.Name(id="abs"), args=[argument], keywords=[]):
            return _columns_of(argument, text)
    raise _refused(text, f"{ast.unparse(node)!r} is none of numbers, columns, - + * /, abs() and parentheses")


def _value(node: ast.expr, columns: Mapping[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float64] | np.float64:
    match node:
        case ast.Name(id=name):
            return columns[name].astype(np.float64)
        case ast.Constant(value=int() | float() as value):
            return np.float64(value)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, columns)
        case ast.Call(args=[argument]):
            return np.abs(_value(argument, columns))
        case ast.BinOp(left=left, op=operation, right=right):
            first, second = _value(left, columns), _value(right, columns)
            match operation:
                case ast.Add():
                    return first + second
                case ast.Sub():
                    return first - second
                case ast.Mult():
                    return first * second
            return first / second
    raise UsageError(f"cannot evaluate {ast.unparse(node)!r}")  # unreachable for a strategy that `parse` made


def _refused(text: str, why: str) -> UsageError:
    return UsageError(
        f"strategy {text!r}: {why}; write an expression over {', '.join(schema.SCORE_COLUMNS)} "
        f"such as 'distance' or 'abs(margin)', or 'random:SEED'"
    )
