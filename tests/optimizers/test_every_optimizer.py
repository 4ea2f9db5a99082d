"""Every transformation that Optax exports, crossed with what jaxmp promises of it.

Each case runs 50 steps in one `lax.scan`, which refuses a state whose dtypes drift, on
several sequences of gradients at once.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmp
from jaxmp.optimizers import get_master_weights

from .optax_cases import CASES, exported

# Some of what Optax exports is deprecated, and works all the same.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

STEPS, BAD_STEP = 50, 20
EVERYDAY = {
    "adafactor", "adamw", "chain", "inject_hyperparams", "lion", "lookahead", "masked",
    "sam", "schedule_free",
}  # fmt: skip
SOME = [
    pytest.param(case, marks=() if case.name in EVERYDAY else pytest.mark.slow)
    for case in CASES
]
every_case = pytest.mark.parametrize("case", SOME, ids=str)


@pytest.fixture(autouse=True)
def _optax_may_promote_ranks():
    with jax.numpy_rank_promotion("allow"):
        yield


def test_list_is_complete():
    named = {case.name.split(" without")[0].split(",")[0] for case in CASES}
    assert named == exported()


def sequences(case):
    """Random, zero and tiny gradients, and the random ones with an inf among them."""
    normal = case.grads(STEPS)
    zero = jax.tree.map(jnp.zeros_like, normal)
    tiny = jax.tree.map(lambda x: jnp.full_like(x, 1e-6), normal)

    def spoil(x):
        bad = jnp.full_like(x[:1], 0.5).at[(0,) * x.ndim].set(jnp.inf)
        return jnp.concatenate([x[:BAD_STEP], bad, x[BAD_STEP:-1]])

    grads = {"normal": normal, "zero": zero, "tiny": tiny}
    grads["spoiled"] = {**normal, "w": spoil(normal["w"])}
    grads["spoiled"]["b"] = jnp.concatenate(
        [normal["b"][:BAD_STEP], normal["b"][:1], normal["b"][BAD_STEP:-1]]
    )
    return grads


def run(case, tx, params, grads, names):
    """Trains on each named sequence; returns params and states after every step."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params, **case.extra(grads))
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    def train(grads):
        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(grads[n] for n in names))
    histories = jax.jit(lambda grads: jax.lax.map(train, grads))(stacked)
    return {n: jax.tree.map(lambda x: x[i], histories) for i, n in enumerate(names)}  # noqa: B023


def plain(case):
    tx = case.make()
    if isinstance(tx, optax.MultiSteps):
        tx = tx.gradient_transformation()
    return optax.with_extra_args_support(tx)


@pytest.fixture(scope="module")
def histories():
    """The runs of a case, made once for all properties."""

    @functools.cache
    def of(case):
        grads = sequences(case)
        params = case.params(jnp.bfloat16)
        tx = jaxmp.loss_scaling(jaxmp.master_weights(case.make()), "mixed_bfloat16")
        mixed = run(case, tx, params, grads, ["normal", "zero", "tiny", "spoiled"])
        start = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        full = run(case, plain(case), start, grads, ["normal", "zero", "tiny"])
        return mixed, full

    return of


def masters(history):
    params, state = history
    return get_master_weights(state, params)


def pairs(x, y):
    return zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)


def equal_bits(x, y):
    for a, b in pairs(x, y):
        np.testing.assert_array_equal(*map(as_bits, (a, b)))


def as_float32(x):
    return np.asarray(x, np.float32)


def as_bits(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


@every_case
def test_working_weights_are_the_rounded_masters(histories, case):
    mixed, _ = histories(case)
    start = case.params(jnp.bfloat16)
    for history in mixed.values():
        steps = zip(
            *map(jax.tree.leaves, (history[0], masters(history), start)), strict=True
        )
        for working, master, first in steps:
            rounded = as_float32(master.astype(jnp.bfloat16))
            before = np.concatenate([as_float32(first)[None], rounded[:-1]])
            # All but those that fall below 2^-16 of their former size in one step.
            falls = np.abs(rounded) < 2.0**-16 * np.abs(before)
            falls &= np.isfinite(before)
            working = as_float32(working)
            np.testing.assert_array_equal(working[~falls], rounded[~falls])
            lost = np.abs(working[falls] - rounded[falls])
            assert (lost <= 2.0**-16 * np.abs(before)[falls]).all()


@every_case
@pytest.mark.parametrize("name", ["normal", "zero", "tiny"])
def test_masters_are_the_plain_float32_run(histories, case, name):
    mixed, full = histories(case)
    steps = 1 if case.chaotic else STEPS
    for ours, theirs in pairs(masters(mixed[name]), full[name][0]):
        ours, theirs = np.asarray(ours)[:steps], np.asarray(theirs)[:steps]
        # A rounding stays, at the size that the weight had when it was rounded.
        size = np.maximum(1.0, np.maximum.accumulate(np.abs(theirs)))
        np.testing.assert_array_less(
            np.abs(ours - theirs), 2e-5 * np.abs(theirs) + 1e-6 * size
        )


@every_case
def test_weights_are_finite_where_float32_weights_are(histories, case):
    mixed, full = histories(case)
    for name, (params, _) in full.items():
        for ours, theirs in pairs(mixed[name][0], params):
            assert (jnp.isfinite(ours) | ~jnp.isfinite(theirs)).all()


@every_case
def test_a_skip_leaves_everything_bit_identical(histories, case):
    mixed, _ = histories(case)
    params, state = mixed["spoiled"]
    moves = (params, state.inner_state)
    before = jax.tree.map(lambda x: x[BAD_STEP - 1], moves)
    after = jax.tree.map(lambda x: x[BAD_STEP], moves)
    equal_bits(before, after)
    assert state.skipped_steps[-1] == 1


@every_case
def test_after_a_skip_it_goes_on_as_if_nothing_had_been(histories, case):
    mixed, _ = histories(case)
    params, state = mixed["normal"]
    before = jax.tree.map(lambda x: x[-2], (params, state.inner_state))
    params, state = mixed["spoiled"]
    equal_bits(before, jax.tree.map(lambda x: x[-1], (params, state.inner_state)))


@every_case
@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)]
)
def test_half_gradients_of_float32_params_are_widened(case, dtype):
    grads = jax.tree.map(lambda g: g.astype(dtype), case.grads(STEPS))
    wide = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    params = case.params(jnp.float32)
    tx = jaxmp.loss_scaling(case.make(), "mixed_bfloat16")
    ours = run(case, tx, params, {"half": grads}, ["half"])["half"][0]
    theirs = run(case, tx, params, {"wide": wide}, ["wide"])["wide"][0]
    steps = 1 if case.chaotic else STEPS
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x[:steps], y[:steps], rtol=2e-5, atol=2e-6
        ),
        ours,
        theirs,
    )


@every_case
@pytest.mark.parametrize(
    "wrapper",
    [
        "cast",
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("master_weights", "split", "stochastic")
        ],
    ],
)
def test_one_compile_and_every_buffer_donated(case, wrapper):
    inner = {
        "master_weights": jaxmp.master_weights,
        "split": functools.partial(jaxmp.master_weights, split=True),
        "stochastic": functools.partial(jaxmp.stochastic_rounding, seed=0),
        "cast": lambda tx: jaxmp.master_weights(
            jaxmp.cast_state(tx, "bfloat16", rounding="stochastic")
        ),
    }[wrapper](case.make())
    tx = jaxmp.loss_scaling(inner, "mixed_bfloat16")
    grads = case.grads(3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **case.extra(grads))
        return optax.apply_updates(params, updates), state

    params = case.params(jnp.bfloat16)
    # Some of Optax hold one buffer twice at first: lookahead in params, sam in state.
    params, state = jax.tree.map(jnp.copy, (params, tx.init(params)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(3):
            params, state = step(params, state, jax.tree.map(lambda g: g[i], grads))  # noqa: B023
    assert step._cache_size() == 1
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))
