"""`python -m jaxmp diagnose`: what it says first, and what it finds."""

import json
import re
import sys

import pytest

from jaxmp.cli import main
from jaxmp.numerics import find_nonfinite

MODULE = """
import jax
import jax.numpy as jnp
import numpy as np

X = np.linspace(-2, 2, 128, dtype=np.float32).reshape(8, 16)
W = jnp.eye(16) + 0.01


def fine(w, x):
    return jnp.mean((x @ w) ** 2)


def make_fine():
    return fine, W, X


def make_small(policy):
    assert policy == "float32"
    return lambda w, x: 1e-7 * fine(w, x), W, X


def overflowing(w, x):
    with jax.named_scope("hidden"):
        x = (x * 3000.0) * (x * 3000.0)
    return jnp.mean((x @ w) ** 2)


def make_overflow():
    return overflowing, W, X @ W


def cancelling(w, x):
    with jax.named_scope("hidden"):
        x = (x @ w + 5000.0) - 5000.0
    return jnp.mean((x @ w) ** 2)


def make_cancel():
    return cancelling, W, X


def make_lost():
    weights = np.logspace(-12, 4, 16, dtype=np.float32)[None]
    return lambda w, x: ((x @ w) * weights).mean(), W, X


def attention(w, x):
    q, k, v = (x @ w[i] for i in range(3))
    q, k = jax.nn.relu(q) + 1e-6, jax.nn.relu(k) + 1e-6
    z, kv = jnp.cumsum(k, axis=-2), jnp.einsum("bnd,bne->bnde", k, v)
    out = jnp.einsum("bnd,bnde->bne", q, jnp.cumsum(kv, axis=-3))
    return jnp.mean((out / jnp.einsum("bnd,bnd->bn", q, z)[..., None]) ** 2)


def make_attention():
    w = 0.3 * jax.random.normal(jax.random.key(2), (3, 16, 8))
    x = jax.random.normal(jax.random.key(3), (1, 4096, 16))
    return attention, w, x[:, :512]


def make_abstract():
    return fine, {"kernel": jax.ShapeDtypeStruct((16, 16), jnp.float32)}, X
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "losses.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("losses", None)


def diagnose(capsys, name, *options):
    status = main(["diagnose", f"losses:make_{name}", *options])
    return status, capsys.readouterr()


def test_a_healthy_function_is_fine(capsys, folder):
    status, printed = diagnose(
        capsys, "fine", "--fail-on", "nonfinite", "--html", "page.html"
    )
    assert status == 0
    assert printed.out.startswith("mixed_float16 is fine here: outputs are off by 0.0")
    assert "Loss scale: nothing overflows up to 2^" in printed.out
    assert "Policies against float32" in printed.out
    page = (folder / "page.html").read_text()
    assert "<p>mixed_float16 is fine here" in page


def test_a_loss_scale_is_advised_where_gradients_become_zero(capsys):
    status, printed = diagnose(capsys, "small", "--fail-on", "underflow")
    assert status == 0
    assert "at scale 1, up to 100.0% of a gradient becomes zero" in printed.out
    assert "init_scale=2.0**" in printed.out


def test_an_overflow_is_named_with_its_line_and_failed_on(capsys):
    status, printed = diagnose(capsys, "overflow", "--fail-on", "nonfinite")
    assert status == 1
    assert printed.out.startswith("Not finite at ")
    assert "losses.py:26: the cast of" in printed.out.splitlines()[0]
    assert "search_policy" in printed.out
    assert "found nonfinite" in printed.err


def test_a_cancellation_is_inaccurate(capsys):
    status, printed = diagnose(
        capsys, "cancel", "--policy", "bfloat16", "--fail-on", "inaccurate"
    )
    assert status == 1
    assert printed.out.startswith("Inaccurate: outputs are off by ")
    assert "sub at losses.py:35 (cancelling) in hidden first" in printed.out
    assert "No loss scaling is needed." in printed.out


def test_gradients_that_no_scale_keeps(capsys):
    status, printed = diagnose(capsys, "lost", "--fail-on", "underflow")
    assert status == 1
    assert "of the gradient of w become zero, even at loss scale" in printed.out
    assert "of the backward pass still become zero" in printed.out


def test_a_scale_that_was_taken_too_high_is_no_finding(capsys):
    status, printed = diagnose(capsys, "attention", "--fail-on", "nonfinite")
    assert status == 0
    assert "Not finite" not in printed.out
    told = re.search(r"nothing overflows up to 2\^(\d+)", printed.out)
    start = re.search(r"init_scale=2\.0\*\*(\d+)", printed.out)
    namespace = {}
    exec(MODULE, namespace)
    loss, w, x = namespace["make_attention"]()
    for found in (told, start):
        scale = 2.0 ** int(found[1])
        assert not find_nonfinite(loss, w, x, policy="mixed_float16", loss_scale=scale)


def test_json(capsys):
    status, printed = diagnose(capsys, "overflow", "--json")
    assert status == 0
    told = json.loads(printed.out, parse_constant=pytest.fail)
    assert told["kinds"] == ["nonfinite"]
    assert told["advice"][0].startswith("Not finite at ")
    assert told["nonfinite"]["primitive"] == "convert_element_type"
    assert told["comparison"]["rows"]
    assert told["trace"]


def test_abstract_arguments_are_refused(capsys):
    status, printed = diagnose(capsys, "abstract")
    assert status == 2
    for words in ("argument 1['kernel']", "holds no numbers", "Return arrays"):
        assert words in printed.err
