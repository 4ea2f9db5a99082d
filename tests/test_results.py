"""Every result has rows, JSON, a page, and a text to print."""

import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxmp
from jaxmp import numerics, report
from jaxmp._views.result import Result, plain

W, X = jnp.full((4, 4), 0.5), jnp.ones((2, 4))


def loss(w, x):
    return jnp.mean(jnp.exp(x @ w))


def monitored():
    tx = numerics.monitor(optax.sgd(0.1), every=1)
    _, state = tx.update({"w": W}, tx.init({"w": W}), {"w": W})
    return numerics.monitor_report(state)


RESULTS = {
    "explain": lambda: jaxmp.explain(loss)(W, X),
    "describe": lambda: jaxmp.describe(nn.Dense(4), "mixed_bfloat16", X),
    "audit": lambda: report.audit(jaxmp.autocast(loss), W, X),
    "compile_step": lambda: report.compile_step(
        loss, W, X, policies=["float32"], targets=["cpu"]
    ),
    "compare": lambda: numerics.compare(loss, "bfloat16", W, X),
    "trace": lambda: numerics.trace(loss)(W, X),
    "find_nonfinite": lambda: numerics.find_nonfinite(loss, 1e3 * W, X),
    "search_policy": lambda: numerics.search_policy(loss, "mixed_bfloat16", (W, X)),
    "monitor_report": monitored,
}


@functools.cache
def result_of(name):
    return RESULTS[name]()


@pytest.mark.parametrize("name", RESULTS)
def test_rows_are_flat_and_json_can_be_read(name):
    result = result_of(name)
    rows = result.to_rows()
    assert rows
    assert all(isinstance(row, dict) for row in rows)
    json.loads(result.to_json(), parse_constant=pytest.fail)  # no NaN, no Infinity


@pytest.mark.parametrize("name", RESULTS)
def test_a_page_is_one_file_that_loads_nothing(name, tmp_path):
    result_of(name).to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<h1>") == 1
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)


@pytest.mark.parametrize("name", RESULTS)
def test_show_prints_the_text_in_a_pipe(name, capsys):
    result_of(name).show()
    assert capsys.readouterr().out == f"{result_of(name)}\n"


def test_no_result_is_left_out():
    assert set(Result.__subclasses__()) == {type(result_of(name)) for name in RESULTS}


def test_plain_values_are_what_json_knows():
    values = {"dtype": jnp.dtype("float32"), "nan": float("nan"), "pair": (1, X[0, 0])}
    assert plain(values) == {"dtype": "float32", "nan": None, "pair": [1, 1.0]}
    assert plain(jax.ShapeDtypeStruct((2,), jnp.float32)).startswith("ShapeDtypeStruct")
