"""What always holds for policies, loss scales and gradients."""

import ast
import contextvars
import functools
import importlib
import inspect
import math
import pkgutil
import re
import threading
import warnings

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxmp
from jaxmp.errors import HalfParamsWarning
from jaxmp.report import compile_for, has_target

MODES = ["mixed_float16", "mixed_bfloat16", "float32", 2.0**10]
OPTIONS = [{}, {"skip_nonfinite": False}, {"grads_are_scaled": True}]
HALF_PARAMS = pytest.mark.filterwarnings("ignore::jaxmp.errors.HalfParamsWarning")


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def same_bits(a, b):
    return bits(a) == bits(b)


# All state is arrays with strong, explicit dtypes.


@HALF_PARAMS
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_state_is_strong_arrays_and_update_returns_its_types(mode, options, dtype):
    tx = jaxmp.loss_scaling(optax.adamw(0.1), mode, **options)
    params = {"w": jnp.ones((3, 2), dtype), "b": jnp.zeros(2, dtype)}
    state = tx.init(params)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    types = jax.tree.map(jax.typeof, (params, state))
    assert not any(x.weak_type for x in jax.tree.leaves(types))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for i in range(6):
        grads = jax.tree.map(lambda p, i=i: jnp.ones_like(p) / (i % 3), params)
        params, state = step(params, state, grads)
        assert jax.tree.map(jax.typeof, (params, state)) == types
    assert step._cache_size() == 1


# The scale is a finite float32 power of two in its bounds.


@settings(max_examples=15, deadline=None)
@given(
    history=st.lists(st.sampled_from([1.0, np.inf, np.nan]), min_size=30, max_size=30),
    interval=st.integers(1, 3),
    smallest=st.integers(-4, 1),
    largest=st.integers(2, 5),
)
def test_the_scale_is_a_bounded_power_of_two_in_float32(
    history, interval, smallest, largest
):
    tx = jaxmp.loss_scaling(
        optax.identity(),
        "mixed_float16",
        init_scale=4.0,
        growth_interval=interval,
        min_scale=2.0**smallest,
        max_scale=2.0**largest,
    )

    @jax.jit
    def run(grads):
        def step(state, grad):
            _, new = tx.update(grad, state)
            return new, (state.loss_scale, new.loss_scale)

        return jax.lax.scan(step, tx.init(jnp.ones((), jnp.float16)), grads)[1]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HalfParamsWarning)
        before, after = run(jnp.asarray(history, jnp.float16))
    assert before.dtype == after.dtype == jnp.float32
    in_a_row = 0
    for grad, old, new in zip(history, before.tolist(), after.tolist(), strict=True):
        assert math.frexp(new)[0] == 0.5
        assert 2.0**smallest <= new <= 2.0**largest
        in_a_row = in_a_row + 1 if grad == 1.0 else 0
        grows = in_a_row == interval and old < 2.0**largest
        assert (new > old) == grows
        in_a_row = 0 if in_a_row == interval else in_a_row


# A skip is a select.

PAYLOADS = np.array([0x7FC12345, 0xFFC00001, 0x80000000, 0x7F800000, 1, 0], np.uint32)


def test_a_skip_is_a_select():
    """NaNs with a payload, -0.0, infinities and subnormals stay what they are."""
    odd = jnp.asarray(PAYLOADS.view(np.float32))
    tx = jaxmp.loss_scaling(optax.trace(0.9), "mixed_float16")
    state = tx.init(odd)._replace(inner_state=optax.TraceState(trace=odd))
    updates, new = jax.jit(tx.update)(jnp.full_like(odd, jnp.inf), state, odd)
    assert same_bits(new.inner_state, state.inner_state)
    assert same_bits(updates, jnp.full_like(odd, -0.0))
    train_state = jaxmp.TrainState.create(
        apply_fn=None, params=odd, tx=optax.adam(0.1), policy="mixed_float16"
    )
    new = jax.jit(lambda s, g: s.apply_gradients(grads=g))(train_state, odd)
    assert same_bits(new.params, odd)
    assert same_bits(jaxmp.select_applied(new.opt_state, odd * 0, odd), odd)


# The unscale uses the scale of the forward, in float32, before anything else.


def test_gradients_are_unscaled_by_the_scale_of_their_forward():
    """On every step the scale moves; no gradient, norm or update shows it."""

    def loss_fn(w):
        half = w.astype(jnp.float16) * jnp.float16(2.0**-20)  # lost without a scale
        return jnp.sum(half.astype(jnp.float32) * 2.0**-4)

    norms = []

    def record(updates, params=None):
        del params
        norms.append(optax.tree.norm(updates))
        return updates

    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.stateless(record))
    tx = jaxmp.loss_scaling(
        clipped, "mixed_float16", init_scale=2.0**12, growth_interval=1
    )
    w = jnp.ones(4)
    state = tx.init(w)
    scales = []
    for _ in range(6):
        scales.append(float(state.loss_scale))
        grads = jaxmp.grad(loss_fn)(w, loss_scale=state)
        assert grads.dtype == jnp.float32
        np.testing.assert_array_equal(grads, 2.0**-24)
        updates, state = tx.update(grads, state, w)
        np.testing.assert_array_equal(updates, 2.0**-24)
    assert scales == [2.0**n for n in range(12, 18)]
    assert {float(norm) for norm in norms} == {2.0**-23}


# Policies and scales are values; there is no ambient mode.

PACKAGES = ["jaxmp.policy", "jaxmp.loss_scale", "jaxmp.optimizers", "jaxmp.training"]
AMBIENT = (list, dict, set, bytearray, contextvars.ContextVar, threading.local)
WRITES = {"append", "add", "extend", "update", "setdefault", "pop", "clear", "remove"}


def modules():
    for name in PACKAGES:
        package = importlib.import_module(name)
        yield package
        for found in pkgutil.iter_modules(package.__path__, name + "."):
            yield importlib.import_module(found.name)


def written_names(source):
    """Names of module level that some statement of the source writes into."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Global):
            yield from node.names
        is_store = isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))
        if isinstance(node, ast.Subscript) and is_store:
            yield ast.unparse(node.value)
        if isinstance(node, ast.Attribute) and node.attr in WRITES:
            yield ast.unparse(node.value)


def test_no_module_keeps_anything_that_changes():
    """What is ambient are tables under a private name in capitals, never written."""
    for module in modules():
        written = set(written_names(inspect.getsource(module)))
        for name, value in vars(module).items():
            if isinstance(value, AMBIENT) and not name.startswith("__"):
                assert re.fullmatch(r"_[A-Z_]+", name), (module, name)
                assert name not in written, (module, name)


def test_a_table_that_is_written_is_noticed():
    for line in ("_T[k] = 1", "del _T[k]", "_T.update(a=1)", "global _T", "_T[k] += 1"):
        assert "_T" in set(written_names(f"def f(k):\n    {line}")), line


def test_policies_and_scales_are_static_values():
    policy = jaxmp.get_policy("mixed_float16")
    same = jaxmp.get_policy(str(policy))
    assert (policy, hash(policy)) == (same, hash(same))
    assert policy == jmp.get_policy("params=float32,compute=float16,output=float32")
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def cast(policy, x):
        traces.append(policy)
        return policy.cast_to_compute(x)

    for each in (policy, same, jaxmp.get_policy("mixed_bfloat16"), policy):
        assert cast(each, jnp.ones(2)).dtype == each.compute_dtype
    assert len(traces) == 2
    assert hash(jaxmp.StaticLossScale(8)) == hash(jaxmp.StaticLossScale(8))


def test_threads_and_interleaved_policies_do_not_disturb_each_other():
    def train(policy):
        tx = jaxmp.loss_scaling(optax.adam(0.1), policy)
        w = jnp.ones(3)
        state = tx.init(w)
        for grad in (1.0, jnp.nan, 0.5):
            updates, state = tx.update(jnp.full(3, grad), state, w)
            w = optax.apply_updates(w, updates)
        return bits((w, state))

    alone = [train(policy) for policy in MODES]
    results = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: results.update({i: train(p)}))
        for i, p in enumerate(MODES)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(len(MODES))] == alone


# Leaves that are not float16, bfloat16 or float32 pass every cast.


def inert_leaves():
    return {
        "int": jnp.array([1, 2]),
        "bool": jnp.array([True]),
        "key": jax.random.key(0),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "complex": jnp.array([1 + 2j]),
        "float8": jnp.ones(2, jnp.float8_e4m3fn),
        "none": None,
        "python int": 3,
        "python float": 0.1,
        "python bool": True,
    }


CASTS = {
    "cast_to_param": jaxmp.get_policy("bf16-true").cast_to_param,
    "cast_to_compute": jaxmp.get_policy("mixed_float16").cast_to_compute,
    "cast_to_output": jaxmp.get_policy("16-true").cast_to_output,
    "cast_to_half": jaxmp.cast_to_half,
    "cast_to_full": jaxmp.cast_to_full,
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_changes_only_float16_bfloat16_and_float32(cast):
    leaves = inert_leaves()
    with jax.enable_x64(True):
        leaves["float64"] = jnp.ones(2, jnp.float64)
        result = CASTS[cast](leaves)
    for name, leaf in leaves.items():
        assert result[name] is leaf, name


@pytest.mark.parametrize("method", ["scale", "unscale"])
@pytest.mark.parametrize(
    "scale", [jaxmp.StaticLossScale(8), jaxmp.DynamicLossScale(2.0**4)]
)
def test_integers_keys_float0_and_float8_pass_scaling(scale, method):
    leaves = inert_leaves()
    for name in ("complex", "python float"):  # these are scaled: they are gradients
        del leaves[name]
    result = getattr(scale, method)(leaves)
    for name, leaf in leaves.items():
        assert result[name] is leaf, name


def test_numpy_float64_counts_as_jax_would_take_it():
    policy = jaxmp.get_policy("mixed_bfloat16")
    assert policy.cast_to_compute(np.ones(2)).dtype == jnp.bfloat16
    assert jaxmp.StaticLossScale(8).unscale(np.ones(2)).dtype == jnp.float32


# Rounding that matters survives XLA.


def half_steps(tx, unroll):
    """Steps whose momentum and weights are stored, and so rounded, in bfloat16."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return lambda carry, grads: jax.lax.scan(step, carry, grads, unroll=unroll)[0]


@HALF_PARAMS
def test_stored_halves_are_rounded_on_every_step_of_a_compiled_loop():
    tx = jaxmp.loss_scaling(optax.sgd(1e-3, momentum=0.9), "bf16-true")
    w = jnp.linspace(0.5, 2.0, 8, dtype=jnp.bfloat16)
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(50, 8)), jnp.float32)
    carry = (w, tx.init(w))
    compiled = jax.jit(half_steps(tx, 1))(carry, grads)
    one_by_one = jax.jit(half_steps(tx, 1))
    for grad in grads:
        carry = one_by_one(carry, grad[None])
    assert same_bits(compiled, carry)


@HALF_PARAMS
@pytest.mark.targets
@pytest.mark.parametrize("target", ["h100", "tpu-v5e"])
def test_the_target_compilers_carry_halves_through_a_loop(target):
    assert has_target(target)
    tx = jaxmp.loss_scaling(optax.sgd(1e-3, momentum=0.9), "bf16-true")
    w = jnp.ones(1024, jnp.bfloat16)
    grads = jnp.ones((50, 1024))
    text = compile_for(target, half_steps(tx, 1), (w, tx.init(w)), grads).as_text()
    loops = re.findall(r"= \((.*?)\) while\(", text)
    assert loops
    for carry in loops:
        assert len(re.findall(r"bf16\[1024\]", carry)) == 2
        assert not re.findall(r"f32\[1024\]", carry)
