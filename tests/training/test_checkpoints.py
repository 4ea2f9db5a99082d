"""Checkpoints with Orbax: every bit comes back, under the same policy only."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmp
from jaxmp.errors import CheckpointPolicyMismatch, InvalidCheckpoint, PolicyError
from jaxmp.training import Checkpoints

POLICIES = ["float32", "mixed_float16", "mixed_bfloat16"]


def make_train_state(policy, width=4, tx=None):
    return jaxmp.TrainState.create(
        apply_fn=None,
        params={"dense": {"kernel": jnp.ones((2, width)), "bias": jnp.zeros(width)}},
        tx=tx or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
        policy=policy,
    )


def make_nnx(policy, width=4):
    model = nnx.Sequential(
        nnx.Linear(2, width, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(width, rngs=nnx.Rngs(0)),
        nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
    )
    tx = jaxmp.loss_scaling(optax.adamw(0.1), policy)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def make_keys(policy, width=4):
    del policy
    return {
        "key": jax.random.key(7),
        "old": jax.random.PRNGKey(7),
        "n": jnp.ones(width),
    }


MAKERS = [make_train_state, make_nnx, make_keys]


def with_other_values(tree):
    """Every float another number, subnormals and NaN among them; counters moved on."""

    def change(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(8)
        if x.dtype == jnp.bool_:
            return ~x
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x + 3
        odd = [jnp.nan, -jnp.inf, 2.0**-140, -0.0, 1 / 3]
        return jnp.resize(jnp.asarray(odd, x.dtype), x.shape) if x.ndim else x / 4

    return jax.tree.map(change, tree)


def bits(tree):
    def of_leaf(x):
        x = (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        )
        return x.shape, x.dtype, np.asarray(x).tobytes()

    return [of_leaf(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("make", MAKERS)
def test_every_bit_comes_back(make, policy, tmp_path):
    saved, fresh = with_other_values(make(policy)), make(policy)
    assert bits(saved) != bits(fresh)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, saved, policy=policy)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(fresh, policy=policy)
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)
    assert bits(restored) == bits(saved)


def test_a_restored_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    @jax.jit
    def step(state, x):
        def loss_fn(params):
            kernel, bias = params["dense"]["kernel"], params["dense"]["bias"]
            return jnp.mean((x @ kernel + bias[None]) ** 2)

        loss, grads = state.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads, value=loss)

    batches = [jnp.full((3, 2), x) for x in (1.0, jnp.inf, 2.0, 3.0)]
    fresh = state = make_train_state("mixed_float16")
    for batch in batches[:2]:
        state = step(state, batch)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state)
        restored = checkpoints.restore(fresh)
    for batch in batches[2:]:
        state, restored = step(state, batch), step(restored, batch)
    assert bits(restored) == bits(state)
    assert int(restored.opt_state.skipped_steps) == 1


@pytest.mark.parametrize("make", [make_train_state, make_nnx])
def test_another_policy_is_refused_and_converted_on_demand(make, tmp_path):
    saved = with_other_values(make("mixed_float16"))
    fresh = make("mixed_bfloat16")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, saved, policy="mixed_float16")
        with pytest.raises(
            CheckpointPolicyMismatch,
            match=r"p=full,c=f16,o=full.*p=full,c=bf16,o=full.*convert=True",
        ):
            checkpoints.restore(fresh, policy="mixed_bfloat16")
        converted = checkpoints.restore(fresh, policy="mixed_bfloat16", convert=True)
    assert float(jaxmp.get_loss_scale(converted)) == 1
    old, new = map(jaxmp.loss_scale_metrics, (saved, converted))
    assert int(new["applied_steps"]) == int(old["applied_steps"]) == 3


def test_conversion_casts_to_the_dtypes_of_the_new_policy(tmp_path):
    params = {"w": jnp.full(3, 1 / 3)}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params, policy="float32")
        restored = checkpoints.restore(half, policy="bf16-true", convert=True)
    assert restored["w"].dtype == jnp.bfloat16
    assert bits(restored) == bits(half)


@pytest.mark.devices(8)
def test_shardings_of_the_fresh_state_are_kept(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    plain = {"w": jnp.arange(16.0)}
    sharded = jax.device_put({"w": jnp.zeros(16)}, spec)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, plain, policy="float32")
        restored = checkpoints.restore(sharded, policy="float32")
    assert restored["w"].sharding == spec
    assert bits(restored) == bits(plain)


def test_the_newest_are_kept_and_any_of_them_is_read(tmp_path):
    with Checkpoints(tmp_path / "run", max_to_keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 2, 5):
            state = {"w": jnp.full(2, step, jnp.float32)}
            checkpoints.save(step, state, policy="float32", notes=[step, 0.1])
        assert checkpoints.latest_step() == 5
        old = checkpoints.restore(state, step=2, policy="float32")
        assert (float(old["w"][0]), checkpoints.notes(step=2)) == (2, [2, 0.1])
        assert checkpoints.notes() == [5, 0.1]
        with pytest.raises(InvalidCheckpoint, match=r"no checkpoint 1 in .*\[2, 5\]"):
            checkpoints.restore(state, step=1, policy="float32")


def test_an_unfinished_checkpoint_is_not_seen(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)}, policy="float32")
    (tmp_path / "2.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_an_empty_folder_says_so(tmp_path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(
            InvalidCheckpoint, match=r"no checkpoint in .*found: none.*folder"
        ),
    ):
        checkpoints.restore(make_train_state("float32"))


def test_a_checkpoint_that_names_no_policy_is_refused(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path) as manager:
        arrays = ocp.args.StandardSave({"w": jnp.ones(2)})
        manager.save(4, args=ocp.args.Composite(arrays=arrays))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(InvalidCheckpoint, match=r"4 in .* has no item 'policy'"),
    ):
        checkpoints.restore({"w": jnp.ones(2)}, policy="float32")


WRONG_FORMS = [
    (lambda: make_train_state("float32", width=5), r"float32\[4\].*float32\[5\]"),
    (lambda: make_train_state("float32", tx=optax.sgd(0.1)), "count.*was only saved"),
    (lambda: make_train_state("float32", tx=optax.amsgrad(0.1)), "was not saved"),
    (
        lambda: jax.tree.map(
            lambda x: x.astype(jnp.float16) if x.dtype == jnp.float32 else x,
            make_train_state("float32"),
        ),
        r"as float32\[.*float16",
    ),
]


@pytest.mark.parametrize(("make", "words"), WRONG_FORMS)
def test_a_checkpoint_of_another_model_is_refused(make, words, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_train_state("float32"))
        with pytest.raises(InvalidCheckpoint, match=words):
            checkpoints.restore(make())


def test_a_state_that_knows_no_policy_needs_one(tmp_path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(PolicyError, match=r"A dict has no policy.*policy='mixed"),
    ):
        checkpoints.save(1, {"w": jnp.ones(2)})


def test_orbax_is_imported_for_checkpoints_only():
    program = (
        "import sys, jaxmp.training; jaxmp.training.TrainState; "
        "assert not any('orbax' in name for name in sys.modules); "
        "jaxmp.training.Checkpoints; assert 'orbax.checkpoint' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
