"""Strategies: their grammar, and their values against NumPy written by hand."""

from __future__ import annotations

import ast
import pickle

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dynams_stream import schema
from dynams_stream.errors import UsageError
from dynams_stream.strategy import LONGEST_TEXT, Strategy


def columns(rows: int = 6) -> dict[str, npt.NDArray[np.float32]]:
    draw = np.random.default_rng(5)
    return {name: draw.normal(size=rows).astype(np.float32) for name in schema.SCORE_COLUMNS}


@pytest.mark.parametrize("name", schema.SCORE_COLUMNS)
def test_a_bare_column_is_taken_as_it_is(name: str) -> None:
    values = np.array([1e-45, -0.0, np.nan, np.inf, 0.1], dtype=np.float32)
    strategy = Strategy.parse(f"  {name} ")
    found = strategy.evaluate({name: values})
    assert found.dtype == np.float32
    assert found.tobytes() == values.tobytes()
    assert (str(strategy), strategy.columns, strategy.seed) == (name, (name,), None)


def test_expressions_are_computed_in_float64_and_rounded_once() -> None:
    c = {name: values.astype(np.float64) for name, values in columns().items()}
    cases = {
        "-loss": -c["loss"],
        "abs(margin)": np.abs(c["margin"]),
        "|margin|": np.abs(c["margin"]),
        "|margin| - |loss*2|": np.abs(c["margin"]) - np.abs(c["loss"] * 2),
        "distance + 0.1*entropy": c["distance"] + 0.1 * c["entropy"],
        "(distance + el2n) / (1 + confidence)": (c["distance"] + c["el2n"]) / (1 + c["confidence"]),
        "distance - loss - entropy": c["distance"] - c["loss"] - c["entropy"],
        "distance - (loss - entropy)": c["distance"] - (c["loss"] - c["entropy"]),
        "2 - -el2n * 1e-3": 2 + c["el2n"] * 1e-3,
        "+margin - +(+loss)": c["margin"] - c["loss"],
        "-distance ** 2": -(c["distance"] ** 2),
        "2 ** -entropy": 2 ** -c["entropy"],
        "exp(-loss) + sqrt(|el2n|)": np.exp(-c["loss"]) + np.sqrt(np.abs(c["el2n"])),
        "log(distance * distance)": np.log(c["distance"] * c["distance"]),
        "min(distance, loss, 0.1)": np.minimum(np.minimum(c["distance"], c["loss"]), 0.1),
        "max(abs(margin), min(loss, entropy))": np.maximum(np.abs(c["margin"]), np.minimum(c["loss"], c["entropy"])),
    }
    for text, expected in cases.items():
        found = Strategy.parse(text).evaluate(columns())
        assert found.dtype == np.float32
        assert found.tobytes() == expected.astype(np.float32).tobytes(), text
    third = Strategy.parse("distance / 3 * 3 - distance").evaluate({"distance": np.array([0.1], dtype=np.float32)})
    exact = np.float64(np.float32(0.1))
    assert third[0] == np.float32(exact / 3 * 3 - exact)


def test_needs_only_the_columns_it_names_in_table_order() -> None:
    assert Strategy.parse("entropy * 2 + distance + entropy").columns == ("distance", "entropy")


def test_division_by_zero_and_overflow_are_values_not_warnings() -> None:
    strategy = Strategy.parse("loss / margin * 1e300 * 1e300")
    loss = np.array([1, -1, 0, 1], dtype=np.float32)
    margin = np.array([0, 0, 0, 1], dtype=np.float32)
    found = strategy.evaluate({"loss": loss, "margin": margin})
    np.testing.assert_array_equal(found, np.array([np.inf, -np.inf, np.nan, np.inf], dtype=np.float32))


@pytest.mark.filterwarnings("error")
def test_what_is_not_a_number_is_not_scored_and_warns_nobody() -> None:
    loss = np.array([-1, 0, 4, np.nan], dtype=np.float32)
    inf, nan = np.inf, np.nan
    cases = {
        "log(loss)": [nan, -inf, np.log(4), nan],
        "sqrt(loss)": [nan, 0, 2, nan],
        "loss ** 0.5": [nan, 0, 2, nan],
        "loss ** -1": [-1, inf, 0.25, nan],  # as 1 / loss
        "exp(loss * 999)": [0, 1, inf, nan],
        "max(loss, 1)": [1, 1, 4, nan],
        "min(1, loss / 0)": [-inf, nan, 1, nan],
        "9 ** 9 ** 9 ** 9 * loss": [-inf, nan, inf, nan],
    }
    for text, expected in cases.items():
        found = Strategy.parse(text).evaluate({"loss": loss})
        np.testing.assert_array_equal(found, np.array(expected, dtype=np.float32), err_msg=text)


def test_null_scores_stay_nan() -> None:
    found = Strategy.parse("abs(margin) + 1").evaluate({"margin": np.array([np.nan, -2], dtype=np.float32)})
    np.testing.assert_array_equal(found, np.array([np.nan, 3], dtype=np.float32))


expressions = st.recursive(
    st.one_of(st.sampled_from(schema.SCORE_COLUMNS), st.integers(0, 99).map(str), st.floats(0, 9).map(repr)),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "**"]), inner).map(lambda t: f"({t[0]}){t[1]}({t[2]})"),
        st.tuples(st.sampled_from(["abs", "sqrt", "exp", "log"]), inner).map(lambda t: f"{t[0]}( {t[1]} )"),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]},{t[2]})"),
        inner.map(lambda text: f"+({text})"),
        inner.map(lambda text: f"-({text})"),
    ),
    max_leaves=6,
).filter(lambda text: any(name in text for name in schema.SCORE_COLUMNS) and len(text) < LONGEST_TEXT // 2)


FUNCTIONS = {
    "abs": np.abs, "sqrt": np.sqrt, "exp": np.exp, "log": np.log, "min": np.minimum, "max": np.maximum,
    "float64": np.float64,
}  # fmt: skip


class Float64(ast.NodeTransformer):
    """Makes each number a float64: Python's own integers are exact, and refuse to be divided by zero."""

    def visit_Constant(self, node: ast.Constant) -> ast.Call:
        return ast.Call(ast.Name("float64", ast.Load()), [node], [])


@example("(distance)/(1.401298464324817e-45)")  # too large for float32
@given(expressions)
def test_canonical_text_means_the_same(text: str) -> None:
    strategy = Strategy.parse(text)
    again = Strategy.parse(str(strategy))
    assert again == strategy
    np.testing.assert_array_equal(again.evaluate(columns()), strategy.evaluate(columns()))
    with np.errstate(all="ignore"):  # Python itself is the second opinion
        tree = ast.fix_missing_locations(Float64().visit(ast.parse(text, mode="eval")))
        expected = eval(
            compile(tree, text, "eval"), dict(FUNCTIONS), {n: v.astype(np.float64) for n, v in columns().items()}
        )
        expected = np.asarray(expected).astype(np.float32)
    np.testing.assert_array_equal(strategy.evaluate(columns()), expected)


def test_spaces_and_parentheses_do_not_make_another_strategy() -> None:
    assert Strategy.parse("( |margin| )") == Strategy.parse("abs( margin )")
    assert str(Strategy.parse("(distance)+(0.10*loss)")) == "distance + 0.1 * loss"
    assert str(Strategy.parse("+(loss) ** (+2)")) == "loss ** 2"
    assert str(Strategy.parse("max( loss,(entropy) , 1)")) == "max(loss, entropy, 1)"
    assert Strategy.parse("+distance").evaluate(columns()).tobytes() == columns()["distance"].tobytes()


def test_a_canonical_text_can_be_read_again_from_a_manifest() -> None:
    longest = "loss+" * 32 + "el2n"  # grows by two characters for each plus
    assert len(longest) < LONGEST_TEXT
    with pytest.raises(UsageError, match=r"at most 200 characters; 'loss [+] loss .* has 228"):
        Strategy.parse(longest)


@pytest.mark.parametrize(("text", "canonical", "seed"), [("random", "random:0", 0), (" random:17 ", "random:17", 17)])
def test_random(text: str, canonical: str, seed: int) -> None:
    strategy = Strategy.parse(text)
    assert (str(strategy), strategy.columns, strategy.seed) == (canonical, (), seed)
    with pytest.raises(UsageError, match="is a random order"):
        strategy.evaluate(columns())


def test_crosses_to_a_worker_process() -> None:
    strategy = Strategy.parse("|margin| + loss")
    before = strategy.evaluate(columns())
    copy = pickle.loads(pickle.dumps(strategy))
    assert copy == strategy
    assert copy.evaluate(columns()).tobytes() == before.tobytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "1",
        "2 + 3",
        "distanc",
        "Distance",
        "label",
        "error",
        "key",
        "distance +",
        "distance // 2",
        "distance % 2",
        "~distance",
        "not distance",
        "distance < 1",
        "distance if loss else margin",
        "distance and loss",
        "abs(distance, loss)",
        "abs()",
        "max(distance)",
        "min()",
        "min(*distance, loss)",
        "log(distance, 2)",
        "sin(distance)",
        "pow(distance, 2)",
        "abs(x=distance)",
        "abs",
        "abs(*distance)",
        "distance.real",
        "distance[0]",
        "[distance]",
        "(distance, loss)",
        "lambda: distance",
        "(distance := 1)",
        "'distance'",
        "True * distance",
        "1j * distance",
        "None",
        "1e999 * distance",
        "__import__('os').system('true') + distance",
        "distance; loss",
        "distance\nloss",
        "|distance",
        "distance|loss",
        "||distance||",
        "random:",
        "random:-1",
        "random:x",
        "random + distance",
        "random:99999999999999999999",
        "(" * 150 + "distance",
        "-" * 190 + "x",
        "distance + " * 30 + "loss",
        "dist\0ance",
    ],
)
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"strategy|seed"):
        Strategy.parse(text)


@pytest.mark.parametrize("text", ["distanc", "distance % 2", "1 + 1", "distance +"])
def test_a_refusal_lists_the_columns(text: str) -> None:
    with pytest.raises(UsageError, match="distance, margin, loss, el2n, entropy, confidence"):
        Strategy.parse(text)


@pytest.mark.parametrize("text", ["||margin|-1|", "|distance - |margin||", "|distance", "distance|loss", "||"])
def test_bars_that_do_not_pair_say_what_to_write(text: str) -> None:
    with pytest.raises(UsageError, match=r"bars come in pairs and cannot be nested: write abs\("):
        Strategy.parse(text)
