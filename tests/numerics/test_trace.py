import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxmp.errors import NonScalarLoss, NumericsError
from jaxmp.numerics import trace
from jaxmp.numerics.trace._result import TraceRow

from .faults import Fault

F16, BF16 = jnp.float16, jnp.bfloat16


def row_of(traced, operation, **attributes):
    """The one row of an operation."""
    found = [
        row
        for row in traced.rows
        if row.operation == operation
        and all(getattr(row, name) == value for name, value in attributes.items())
    ]
    assert len(found) == 1, str(traced)
    return found[0]


# Faults that make no NaN: the worst row is on the marked line.


def position_in_bfloat16():
    def loss(w, x):
        positions = jnp.arange(1000).astype(BF16)  # FAULT
        return (x * w * jnp.sin(positions.astype(jnp.float32) / 1000)).mean()

    return loss, (jnp.float32(1), jnp.ones(1000)), {"dtype": BF16}


def gradient_of_an_embedding_underflows():
    def loss(table):
        rows = table[jnp.array([0, 2])]
        return (rows * 1e-9).sum()  # FAULT

    return loss, (jnp.ones((4, 2)),), {}


def activation_overflows():
    def loss(w, x):
        y = x * 1e5  # FAULT
        return jnp.tanh(w * y).sum() + (w * 1e-8).sum()

    return loss, (jnp.ones(3), jnp.ones(3)), {}


def probability_underflows():
    def loss(w):
        p = jax.nn.softmax(w) + 1.0
        tail = jnp.exp(-20 * w)  # FAULT
        return p[0] + (tail * 1e8).sum() / 1e8

    return loss, (jnp.full(3, 1.0),), {"backward": False}


@pytest.mark.parametrize(
    "make",
    [
        position_in_bfloat16,
        gradient_of_an_embedding_underflows,
        activation_overflows,
        probability_underflows,
    ],
    ids=lambda make: make.__name__,
)
def test_worst_row_is_on_the_line_of_the_fault(make):
    fn, args, options = make()
    worst = trace(fn, **options)(*args).rows[0]
    assert worst.line == Fault(make, "", "").line, worst
    assert worst.kind != "fine"


def test_gradient_of_an_embedding_underflows_unless_scaled():
    fn, args, options = gradient_of_an_embedding_underflows()
    lost = row_of(trace(fn, **options)(*args), "scatter-add")
    kept = row_of(trace(fn, loss_scale=2.0**16, **options)(*args), "scatter-add")
    assert (lost.underflows, lost.zeros, lost.is_backward) == (0.5, 0.5, True)
    assert (kept.underflows, kept.subnormals) == (0, 0)


# Every value is measured, with what NumPy says of it.


def test_row_agrees_with_numpy():
    x = np.array([0, 1e-9, 1e-6, 0.5, 1e5, 2.0], np.float32)
    traced = trace(lambda x: jnp.sin(x) * 0 + x * 1.0, dtype="float16")(x)
    row = row_of(traced, "mul", amax=float(np.float32(1e5)))
    assert row.smallest == np.float32(1e-9)
    np.testing.assert_allclose(row.mean, np.abs(x).mean(), rtol=1e-6)
    assert row.size == 6
    fractions = (row.zeros, row.underflows, row.subnormals, row.overflows)
    assert fractions == (1 / 6, 1 / 6, 1 / 6, 1 / 6)
    assert (row.times, row.dtype, row.nonfinite) == (1, "float32", 0)


@pytest.mark.parametrize(
    ("dtype", "overflows", "underflows"),
    [
        ("float16", 0.25, 0.25),
        ("bfloat16", 0.0, 0.0),
        ("float8_e4m3fn", 0.5, 0.25),
        ("float8_e5m2", 0.25, 0.25),
    ],
)
def test_what_if(dtype, overflows, underflows):
    x = jnp.array([1e-9, 1.0, 1e3, 1e5])
    row = row_of(trace(jnp.negative, dtype=dtype)(x), "neg")
    assert (row.overflows, row.underflows) == (overflows, underflows)


def test_loop_is_one_row_that_sums_its_iterations():
    def fn(x):
        return lax.scan(lambda h, x: (h, jnp.exp(x)), 0.0, x)[1]

    row = row_of(trace(fn)(jnp.array([0.0, 5.0, 12.0, 20.0])), "exp")
    assert (row.times, row.size, row.overflows) == (4, 4, 0.5)
    np.testing.assert_allclose(row.amax, np.exp(20), rtol=1e-6)


def test_loops_inside_of_loops_and_branches_are_entered():
    def fn(x):
        def inner(h, x):
            return lax.cond(x > 0, jnp.exp, jnp.sin, x) + h, None

        def outer(h, row):
            return lax.scan(inner, h, row)[0], None

        first = lax.scan(outer, 0.0, x)[0]
        return lax.while_loop(lambda h: h < 100, lambda h: h * 2, first)

    traced = trace(fn, backward=False)(jnp.array([[1.0, -1.0, 2.0], [3.0, -2.0, -3.0]]))
    assert row_of(traced, "exp").times == 3
    assert row_of(traced, "sin").times == 3
    assert row_of(traced, "mul").times == 2


def test_backward_rows_have_the_line_and_path_of_the_forward():
    def loss(w):
        with jax.named_scope("head"):
            return jnp.sum(jnp.sin(w))

    traced = trace(loss)(jnp.ones(3))
    backward = [row for row in traced.rows if row.is_backward]
    assert {row.operation for row in backward if row.path == "head"} == {"mul", "cos"}
    assert {row.path for row in backward} == {"head", "loss_scale"}
    lines = {row.line for row in backward if row.path == "head"}
    assert lines == {row_of(traced, "sin").line}


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "plain"])
def test_what_only_the_gradient_needs_is_backward(wrap):
    def loss(w):
        return lax.scan(lambda h, x: (h + jnp.sin(x), None), 0.0, w)[0]

    traced = trace(wrap(loss))(jnp.ones(3))
    way = {
        row.operation: row.is_backward
        for row in traced.rows
        if row.path != "loss_scale"
    }
    way.pop("convert_element_type", None)  # of the loop's start, to float32
    assert way == {"sin": False, "cos": True, "add": False, "mul": True}


def test_loss_scale_moves_the_backward_only():
    def loss(w):
        return jnp.sum(w * w) * 1e-8

    at_1 = trace(loss)(jnp.ones(3))
    at_1024 = trace(loss, loss_scale=1024.0)(jnp.ones(3))
    assert (at_1.loss_scale, at_1024.loss_scale) == (1.0, 1024.0)

    def backward(traced):
        return {row.order: row for row in traced.rows if row.is_backward}

    def forward(traced):
        return [row for row in traced.rows if not row.is_backward]

    # What multiplies the loss by the scale stands outside of `loss`.
    mine = [row for row in forward(at_1) if row.function.endswith("loss")]
    for row in mine:
        (other,) = (r for r in forward(at_1024) if r.order == row.order)
        assert other == row
    scaled = backward(at_1024)
    assert scaled
    for order, row in backward(at_1).items():
        assert scaled[order].amax == 1024 * row.amax


def test_policy_runs_under_autocast():
    def loss(w, x):
        return jnp.mean((x @ w).astype(jnp.float32))

    args = (jnp.ones((4, 4)), jnp.ones((2, 4)))
    plain = [r.dtype for r in trace(loss)(*args).rows if r.operation == "dot_general"]
    half = trace(loss, "mixed_bfloat16")(*args)
    cast = [r.dtype for r in half.rows if r.operation == "dot_general"]
    assert set(plain) == {"float32"}
    assert set(cast) == {"bfloat16"}
    assert half.dtype == "bfloat16"
    assert trace(loss, "float32")(*args).dtype == "float16"


def test_mask_of_the_largest_number_is_no_overflow():
    x = jnp.arange(4.0)
    traced = trace(lambda x: jnp.where(x > 1, x, jnp.finfo(x.dtype).min))(x)
    row = row_of(traced, "select_n")
    assert (row.overflows, row.amax, row.size) == (0, 3, 2)


def test_nonfinite_results_are_counted_where_they_are_made():
    traced = trace(lambda x: jnp.sqrt(jnp.log(x)))(jnp.array([0.0, 2.0]))
    made = {row.operation: (row.nonfinite, row.made_nonfinite) for row in traced.rows}
    assert made == {"log": (1, 1), "sqrt": (1, 0)}
    assert traced.rows[0].operation == "log"


def test_sum_over_devices_is_looked_into():
    from jax.sharding import Mesh, PartitionSpec

    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = PartitionSpec("data")

    def fn(x):
        def shard(x):
            return lax.psum(jnp.exp(x), "data")

        return jax.shard_map(
            shard, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()
        )(x)

    row = row_of(trace(fn)(jnp.array([0.0, 1.0, 2.0, 12.0])), "exp")
    assert (row.size, row.overflows) == (4, 0.25)


def test_complex_numbers_are_two_each():
    row = row_of(trace(jnp.conj)(jnp.array([1e5 + 1j])), "conj")
    assert (row.size, row.overflows) == (2, 0.5)


# What is handed out


@pytest.fixture(scope="module")
def traced():
    def loss(w, x):
        with jax.named_scope("block_0"):
            return jnp.mean(jnp.exp(w * x) * 1e-9)

    return trace(loss)(jnp.float32(1), jnp.array([1.0, 12.0]))


def test_rows_are_sorted_by_badness(traced):
    keys = [row.badness for row in traced.rows]
    assert keys == sorted(keys, reverse=True)


def test_text_table(traced):
    first, second, *_ = str(traced).splitlines()
    assert first.split()[:4] == ["operation", "source", "path", "way"]
    assert second.split()[0] == "exp"
    assert "50.0 %" in second
    assert "block_0" in second
    assert str(traced).splitlines()[-1] == traced.summary
    assert "1 would overflow" in traced.summary


def test_rows_as_dictionaries(traced):
    rows = traced.to_rows()
    assert set(rows[0]) == {field.name for field in dataclasses.fields(TraceRow)}
    assert [row["operation"] for row in rows] == [r.operation for r in traced.rows]


def test_html_page(traced, tmp_path):
    traced.to_html(tmp_path / "trace.html")
    page = (tmp_path / "trace.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<tr class=") == len(traced.rows)
    assert 'data-kind="overflow"' in page
    assert "http" not in page


# Mistakes


def test_dtype_has_to_be_a_floating_one():
    with pytest.raises(NumericsError, match="int8"):
        trace(jnp.sin, dtype="int8")


def test_gradient_needs_a_loss():
    with pytest.raises(NonScalarLoss, match="Return the loss"):
        trace(jnp.sin, backward=True)(jnp.ones(3))


def test_gradient_needs_a_floating_argument():
    with pytest.raises(NonScalarLoss, match="argnums"):
        trace(lambda i: i.sum() * 1.0, backward=True)(jnp.arange(3))
