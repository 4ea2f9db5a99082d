"""Outermost around everything that Optax exports: one list crossed with properties.

Each optimizer is compiled once, for six steps of which two are non-finite, and every
property is read off what that run left behind.
"""

import functools
import inspect
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import jaxmp

SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 8)
MASK = {"bias": False, "kernel": True}


def is_kernel(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


WRAPPERS = {
    "chain": lambda: optax.chain(optax.clip(1.0), optax.trace(0.9), optax.scale(-0.1)),
    "named_chain": lambda: optax.named_chain(
        ("clip", optax.clip(1.0)), ("adam", optax.adam(0.1))
    ),
    "clip_by_global_norm": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(0.1)
    ),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2),
    "MultiSteps.gradient_transformation": lambda: optax.MultiSteps(
        optax.adam(0.1), 2
    ).gradient_transformation(),
    "MultiSteps skip_not_finite": lambda: optax.MultiSteps(
        optax.adam(0.1), 2, should_skip_update_fn=optax.skip_not_finite
    ),
    "masked": lambda: optax.masked(optax.adamw(0.1), MASK),
    "masked by a function": lambda: optax.masked(optax.adamw(0.1), is_kernel),
    "partition": lambda: optax.partition(
        {"a": optax.adam(0.1), "b": optax.sgd(0.1, momentum=0.9)},
        {"bias": "a", "kernel": "b"},
    ),
    "multi_transform": lambda: optax.multi_transform(
        {"a": optax.adam(SCHEDULE), "b": optax.set_to_zero()},
        {"bias": "a", "kernel": "b"},
    ),
    "freeze": lambda: optax.chain(optax.adam(0.1), optax.freeze(MASK)),
    "selective_transform": lambda: optax.selective_transform(
        optax.adam(0.1), freeze_mask=MASK
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(SCHEDULE),
    "inject_hyperparams float": lambda: optax.inject_hyperparams(optax.adamw)(0.1),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(
        optax.adam
    )(0.1),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 1),
    "apply_every": lambda: optax.chain(optax.apply_every(2), optax.sgd(0.1)),
    "conditionally_transform": lambda: optax.conditionally_transform(
        optax.scale(-0.1), lambda step: step % 2 == 0
    ),
    "conditionally_mask": lambda: optax.conditionally_mask(
        optax.adam(0.1), lambda step: step % 2 == 0
    ),
    "lookahead": lambda: optax.lookahead(optax.adam(0.1), 2, 0.5),
    "lookahead reset": lambda: optax.lookahead(
        optax.adam(0.1), 2, 0.5, reset_state=True
    ),
    "flatten": lambda: optax.flatten(optax.adam(0.1)),
    "schedule": lambda: optax.adamw(SCHEDULE),
    "scale_by_schedule": lambda: optax.chain(
        optax.scale_by_adam(), optax.scale_by_schedule(SCHEDULE), optax.scale(-1.0)
    ),
    "ema": lambda: optax.chain(optax.sgd(0.1), optax.ema(0.9)),
    "add_noise": lambda: optax.chain(
        optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)
    ),
    "adaptive_grad_clip": lambda: optax.chain(
        optax.adaptive_grad_clip(0.1), optax.sgd(0.1)
    ),
    "keep_params_nonnegative": lambda: optax.chain(
        optax.sgd(0.1), optax.keep_params_nonnegative()
    ),
    "contrib.reduce_on_plateau": lambda: optax.chain(
        optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1, cooldown=0)
    ),
    "contrib.schedule_free": lambda: optax.contrib.schedule_free(
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(SCHEDULE)), SCHEDULE
    ),
    "contrib.mechanize": lambda: optax.contrib.mechanize(optax.sgd(0.1)),
    "contrib.sam": lambda: optax.contrib.sam(
        optax.sgd(0.1),
        optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
        sync_period=2,
    ),
}

NEED_MORE_THAN_GRADIENTS = {
    "contrib.dpsgd": "gradients of every example",
    "contrib.sophia": "an objective function",
}


def aliases():
    """Every optimizer of Optax that is made from a learning rate at most."""
    found = {}
    for module, prefix in ((optax, ""), (optax.contrib, "contrib.")):
        for name, make in vars(module).items():
            is_alias = inspect.isfunction(make) and not name.startswith("scale_by")
            parameters = inspect.signature(make).parameters if is_alias else {}
            if "learning_rate" not in parameters or "base_optimizer" in parameters:
                continue
            needs = parameters["learning_rate"].default is inspect.Parameter.empty
            given = {"learning_rate": 0.1} if needs else {}
            if name[0] != "_" and prefix + name not in NEED_MORE_THAN_GRADIENTS:
                found[prefix + name] = functools.partial(make, **given)
    return found


ALIASES = aliases()
COMMON = [
    "adafactor",
    "adam",
    "adamw",
    "lamb",
    "lbfgs",
    "lion",
    "rmsprop",
    "sgd",
    "contrib.muon",
    "contrib.prodigy",
    "contrib.schedule_free_adamw",
]
REFUSE_EXTRA_ARGUMENTS = {"contrib.sam"}
GOOD, BAD = (0, 1, 3, 5), (2, 4)


class Run(NamedTuple):
    """What is left of six steps, on the host, and of the four good ones alone."""

    snapshots: list[Any]
    without_bad_steps: list[Any]
    inner: Any
    name: str
    types: list[Any]
    compiles: int
    donated: bool
    messages: list[str]


def initial_params(name, dtype):
    params = {
        "bias": jnp.array([0.5, -0.0, 2.0], dtype),
        "kernel": jnp.linspace(-1.0, 1.0, 12, dtype=dtype).reshape(4, 3),
    }
    is_lookahead = name.startswith("lookahead")
    return optax.LookaheadParams.init_synced(params) if is_lookahead else params


def loss_fn(params):
    if isinstance(params, optax.LookaheadParams):
        params = params.fast
    return sum(jnp.sum(jnp.sin(p.astype(jnp.float32))) for p in params.values())


def gradients(params, step):
    """Gradients that depend on parameters and step; NaN and inf on the bad ones."""
    if isinstance(params, optax.LookaheadParams):
        params = params.fast
    value, grads = jax.value_and_grad(loss_fn)(params)
    grads = jax.tree.map(lambda g: g * (1 + step).astype(g.dtype), grads)
    is_bad = jnp.isin(step, jnp.array(BAD))
    grads["bias"] = jnp.where(is_bad, jnp.nan, grads["bias"])
    grads["kernel"] = (
        grads["kernel"].at[0, 0].set(jnp.where(is_bad, jnp.inf, grads["kernel"][0, 0]))
    )
    return value, grads


def stepper(tx, name):
    def step(params, state, number):
        value, grads = gradients(params, number)
        extra = {"value": value, "grad": grads, "value_fn": loss_fn}
        if name in REFUSE_EXTRA_ARGUMENTS:
            extra = {}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def run_steps(step, init, params, numbers):
    params, state = jax.jit(lambda p: (p, init(p)))(params)
    snapshots, types, donated = [to_host((params, state))], [], True
    for number in numbers:
        types.append(types_of((params, state)))
        old = jax.tree.leaves((params, state))
        params, state = step(params, state, jnp.int32(number))
        snapshots.append(to_host((params, state)))
        donated &= all(x.is_deleted() for x in old if x.size > 1)
    types.append(types_of((params, state)))
    return snapshots, types, donated


def to_host(tree):
    def copy(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.array(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(copy, tree)


def types_of(tree):
    return [jax.typeof(x) for x in jax.tree.leaves(tree)]


@functools.cache
def run(name, dtype=jnp.float32, wrap=lambda inner: inner):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optax's, about arguments to come
        inner = {**WRAPPERS, **ALIASES}[name]()
    tx = jaxmp.loss_scaling(wrap(inner), "mixed_float16", growth_interval=100)
    params = initial_params(name, dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step = stepper(tx, name)
        snapshots, types, donated = run_steps(step, tx.init, params, range(6))
        without, _, _ = run_steps(step, tx.init, params, GOOD)
    return Run(
        snapshots=snapshots,
        without_bad_steps=without,
        inner=inner,
        name=name,
        types=types,
        compiles=step._cache_size(),
        donated=donated,
        messages=[str(w.message) for w in caught],
    )


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        assert a.tobytes() == e.tobytes(), (a, e)


# Properties


def a_bad_step_leaves_parameters_and_inner_state_bit_identical(run):
    for bad in BAD:
        (old_params, old), (params, state) = run.snapshots[bad : bad + 2]
        assert_same_bits(params, old_params)
        assert_same_bits(state.inner_state, old.inner_state)


def a_good_step_moves_something(run):
    for good in GOOD:
        old, new = run.snapshots[good : good + 2]
        before = [x.tobytes() for x in jax.tree.leaves((old[0], old[1].inner_state))]
        after = [x.tobytes() for x in jax.tree.leaves((new[0], new[1].inner_state))]
        assert before != after


def training_goes_on_as_if_bad_steps_had_not_been_there(run):
    (params, state), (expected_params, expected) = (
        run.snapshots[-1],
        run.without_bad_steps[-1],
    )
    assert_same_bits(params, expected_params)
    assert_same_bits(state.inner_state, expected.inner_state)


def good_steps_are_those_of_the_bare_optimizer(run):
    bare = run.inner
    if hasattr(bare, "gradient_transformation"):
        bare = bare.gradient_transformation()
    bare = optax.with_extra_args_support(bare)
    step = stepper(bare, run.name)
    snapshots, _, _ = run_steps(step, bare.init, run.snapshots[0][0], GOOD)
    for (params, state), expected in zip(run.without_bad_steps, snapshots, strict=True):
        actual = jax.tree.leaves((params, state.inner_state))
        for a, e in zip(actual, jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, rtol=2e-5, atol=1e-6)


def everything_stays_finite(run):
    for params, state in run.snapshots:
        for x in jax.tree.leaves((params, state.inner_state)):
            assert not np.isnan(x).any()


def one_compile(run):
    assert run.compiles == 1


def types_are_strong_and_constant(run):
    assert all(types == run.types[0] for types in run.types)
    assert not any(getattr(x, "weak_type", False) for x in run.types[0])


def donation_is_used_without_a_warning(run):
    assert run.donated
    assert [m for m in run.messages if "donat" in m] == []


def steps_are_counted_and_the_scale_backs_off(run):
    state = run.snapshots[-1][1]
    assert (state.applied_steps, state.skipped_steps) == (4, 2)
    assert (state.consecutive_skips, state.good_steps) == (0, 1)
    assert state.loss_scale == 2.0**14
    assert state.grads_finite


PROPERTIES = [
    a_bad_step_leaves_parameters_and_inner_state_bit_identical,
    a_good_step_moves_something,
    training_goes_on_as_if_bad_steps_had_not_been_there,
    everything_stays_finite,
    one_compile,
    types_are_strong_and_constant,
    donation_is_used_without_a_warning,
    steps_are_counted_and_the_scale_backs_off,
]


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_outermost_around_a_wrapper(name, holds):
    holds(run(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRAPPERS)
def test_good_steps_of_a_wrapper_are_those_without_loss_scaling(name):
    good_steps_are_those_of_the_bare_optimizer(run(name))


@pytest.mark.parametrize("name", COMMON)
@pytest.mark.parametrize("holds", PROPERTIES)
def test_around_a_common_optimizer(name, holds):
    holds(run(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.parametrize(
    "holds", [*PROPERTIES, good_steps_are_those_of_the_bare_optimizer]
)
def test_around_every_alias_of_optax(name, holds):
    holds(run(name))


def warns_about_half_parameters(run):
    about = [m for m in run.messages if "stored in half precision" in m]
    assert about
    assert "bias' is the first" in about[0]


# With bfloat16 parameters and no float32 copy of them, these mix dtypes in a `cond`,
# or round b2 = 0.999 to 1: Optax's own, and what the warning is about.
NEED_FLOAT32_PARAMETERS = {
    "apply_if_finite": TypeError,
    "conditionally_mask": TypeError,
    "contrib.mechanize": TypeError,
    "novograd": TypeError,
    "inject_hyperparams": AssertionError,
    "inject_hyperparams float": AssertionError,
    "inject_stateful_hyperparams": AssertionError,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in (*WRAPPERS, *ALIASES) if n not in NEED_FLOAT32_PARAMETERS]
)
@pytest.mark.parametrize("holds", [*PROPERTIES, warns_about_half_parameters])
def test_around_every_optimizer_with_bfloat16_parameters(name, holds):
    holds(run(name, jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("name", NEED_FLOAT32_PARAMETERS)
def test_what_needs_float32_parameters_has_them_with_master_weights(name):
    with pytest.raises(NEED_FLOAT32_PARAMETERS[name]):
        everything_stays_finite(run(name, jnp.bfloat16))
    for holds in PROPERTIES:
        holds(run(name, jnp.bfloat16, jaxmp.master_weights))


def test_the_sweep_found_the_aliases():
    assert len(ALIASES) >= 40
    assert set(COMMON) <= set(ALIASES)
