"""What a selection ranks by: an expression over the score columns, or a random order.

    distance                    the smallest distance to the decision boundary (the default)
    |margin|, abs(margin)       the smallest margin, right or wrong
    -loss                       the largest loss
    distance + 0.1 * entropy    numbers, columns, + - * / **, parentheses
    min(distance, log(loss))    abs, sqrt, exp, log of one value; min, max of two or more
    random, random:7            a random order with seed 0, 7

The samples with the smallest values are selected. Values are rounded to float32 first: those that are equal then tie.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import numpy.typing as npt

from dynams_stream import schema
from dynams_stream.errors import UsageError

_Values = npt.NDArray[np.float64] | np.float64

LONGEST_TEXT = 200
"""Characters a strategy may have; it also bounds how deep an expression nests."""
_BARS = re.compile(r"\|([^|]+)\|")
_OPERATORS: dict[type[ast.operator], Callable[[_Values, _Values], _Values]] = {
    ast.Add: np.add,
    ast.Sub: np.subtract,
    ast.Mult: np.multiply,
    ast.Div: np.divide,
    ast.Pow: np.power,
}
_OF_ONE: dict[str, Callable[[_Values], _Values]] = {"abs": np.abs, "sqrt": np.sqrt, "exp": np.exp, "log": np.log}
_OF_SEVERAL: dict[str, Callable[[_Values, _Values], _Values]] = {"min": np.minimum, "max": np.maximum}
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
        written = _BARS.sub(r"abs(\1)", stripped)
        if "|" in written:
            raise _refused(text, "bars come in pairs and cannot be nested: write abs(…)")
        try:
            tree = _WithoutPlus().visit(ast.parse(written, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise _refused(text, str(error)) from error
        used = _columns_of(tree, text)
        if not used:
            raise _refused(text, "it names no score column")
        canonical = ast.unparse(tree)
        if len(canonical) > LONGEST_TEXT:  # manifests have it so, and it is read again from there
            raise UsageError(f"a strategy has at most {LONGEST_TEXT} characters; {canonical!r} has {len(canonical)}")
        return cls(text=canonical, columns=tuple(name for name in schema.SCORE_COLUMNS if name in used))

    @cached_property
    def _tree(self) -> ast.expr:
        return ast.parse(self.text, mode="eval").body

    def evaluate(self, columns: Mapping[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float32]:
        """The value of each sample, float32.

        Args:
            columns: float32 arrays of one length for all of `self.columns`; NaN where there is no score.

        A bare column comes back as it is; everything else is computed in float64 and rounded once. Division by zero
        gives an infinity or NaN, so does 0 to a negative power, and log(0) is −inf; a root or logarithm of a negative
        number is NaN. NaN means "not scored".

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
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in _OPERATORS:
            return _columns_of(left, text) | _columns_of(right, text)
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in _OF_ONE:
            return _columns_of(argument, text)
        case ast.Call(func=ast.Name(id=name), args=[_, _, *_] as arguments, keywords=[]) if name in _OF_SEVERAL:
            return set().union(*(_columns_of(argument, text) for argument in arguments))
    raise _refused(
        text,
        f"{ast.unparse(node)!r} is none of numbers, columns, + - * / **, parentheses, "
        f"{', '.join(_OF_ONE)} of one value, {' and '.join(_OF_SEVERAL)} of two or more",
    )


class _WithoutPlus(ast.NodeTransformer):
    """Leaves out each unary plus, which changes nothing."""

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        return node.operand if isinstance(node.op, ast.UAdd) else node


def _value(node: ast.expr, columns: Mapping[str, npt.NDArray[np.float32]]) -> _Values:
    match node:
        case ast.Name(id=name):
            return columns[name].astype(np.float64)
        case ast.Constant(value=int() | float() as value):
            return np.float64(value)
        case ast.UnaryOp(operand=operand):
            return -_value(operand, columns)
        case ast.BinOp(left=left, op=operation, right=right):
            return _OPERATORS[type(operation)](_value(left, columns), _value(right, columns))
        case ast.Call(func=ast.Name(id=name), args=[argument]):
            return _OF_ONE[name](_value(argument, columns))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return reduce(_OF_SEVERAL[name], (_value(argument, columns) for argument in arguments))
    raise UsageError(f"cannot evaluate {ast.unparse(node)!r}")  # unreachable for a strategy that `parse` made


def _refused(text: str, why: str) -> UsageError:
    return UsageError(
        f"strategy {text!r}: {why}; write an expression over {', '.join(schema.SCORE_COLUMNS)} "
        f"such as 'distance' or 'abs(margin)', or 'random:SEED'"
    )
