"""One process of several: `python worker.py JOB PORT PROCESS COUNT FOLDER`.

It prints what it finds as lines of JSON, and flushes each, so that a test can act on
one while the process runs on.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmp
from jaxmp.errors import ProcessPolicyMismatch
from jaxmp.numerics import no_bad_batch, record_bad_batch
from jaxmp.sharding import (
    check_same_policy,
    reduce_gradients,
    replicated,
    state_shardings,
)
from jaxmp.training import Checkpoints

POLICY = "mixed_float16"
FIRST_SCALE = 2.0**10
STEPS = 6
# One value of the batch of this step, on the last device, is infinite.
BAD_STEP = 2
ROWS, WIDTH = 16, 8


def say(kind, **found):
    print(json.dumps({"kind": kind, **found}), flush=True)


def new_mesh():
    kinds = (AxisType.Auto,)
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=kinds)


def digest(tree):
    """A hash of the bits of this process's part of every array."""
    found = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        for shard in sorted(x.addressable_shards, key=lambda shard: shard.device.id):
            found.update(np.asarray(shard.data).tobytes())
    return found.hexdigest()


def first_weights():
    draw = np.random.default_rng(0).normal
    shapes = {"in": (ROWS, WIDTH), "out": (WIDTH, ROWS), "bias": (ROWS,)}
    return {name: draw(size=shape).astype(np.float32) for name, shape in shapes.items()}


def batch_of(step, mesh):
    x = np.random.default_rng(step).normal(size=(16, ROWS)).astype(np.float32)
    if step == BAD_STEP:
        x[-1, 3] = np.inf
    sharding = NamedSharding(mesh, P("data"))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def loss_fn(params, x):
    half = {name: w.astype(jnp.float16) for name, w in params.items()}
    h = jnp.tanh(x.astype(jnp.float16) @ half["in"])
    y = (h @ half["out"] + half["bias"][None]).astype(jnp.float32)
    return jnp.mean((y - x) ** 2)


def new_state(mesh):
    """A train state whose optimizer state is divided over all devices."""
    everywhere = NamedSharding(mesh, P())

    def create(params):
        return jaxmp.TrainState.create(
            apply_fn=None,
            params=params,
            tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01)),
            policy=POLICY,
            init_scale=FIRST_SCALE,
        )

    params = first_weights()
    shardings = state_shardings(jax.eval_shape(create, params), params, everywhere)
    return jax.jit(create, out_shardings=shardings)(params), shardings


def training_step(shardings):
    def step(state, record, x):
        loss, grads = state.value_and_grad(loss_fn)(state.params, x)
        new = state.apply_gradients(grads=grads, value=loss)
        record = record_bad_batch(
            record, new.opt_state, batch=x, loss_scale=state.opt_state
        )
        return new, record

    return jax.jit(step, out_shardings=(shardings, None))


def train(folder, *, pause=False):
    """Trains to the end, from the newest checkpoint in the folder if there is one."""
    mesh = new_mesh()
    state, shardings = new_state(mesh)
    record = no_bad_batch(batch=batch_of(0, mesh))
    step_fn = training_step(shardings)
    with Checkpoints(Path(folder) / "checkpoints", max_to_keep=2) as checkpoints:
        first = checkpoints.latest_step()
        if first is not None:
            state = checkpoints.restore(state)
        for step in range(first or 0, STEPS):
            before = digest(state.params), digest(state.opt_state.inner_state)
            state, record = step_fn(state, record, batch_of(step, mesh))
            metrics = jaxmp.loss_scale_metrics(state.opt_state)
            say(
                "step",
                step=step,
                moved=[digest(state.params), digest(state.opt_state.inner_state)]
                != list(before),
                **{name: float(x) for name, x in metrics.items()},
            )
            checkpoints.save(step + 1, state)
            if pause and step == 3:
                say("waits")
                # The other one goes on, and hangs in its next collective.
                if jax.process_index() == 1:
                    input()
    say("end", state=digest(state), start=first or 0)
    return record


def step_by_hand(mesh):
    """A good and a bad step in `shard_map`, whose gradients travel in bfloat16."""
    options = {"axis_name": "data", "init_scale": FIRST_SCALE}
    tx = jaxmp.loss_scaling(optax.sgd(0.1), POLICY, **options)
    params = first_weights()

    def step(params, state, x):
        local = replicated(params, "data")
        loss, grads = jaxmp.value_and_grad(loss_fn)(local, x, loss_scale=state)
        grads = reduce_gradients(grads, "data", dtype="bfloat16")
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    specs = (P(), P(), P("data"))
    step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=(P(), P()))
    step = jax.jit(step)
    params, state = jax.device_put((params, tx.init(params)), NamedSharding(mesh, P()))
    for index in (BAD_STEP, BAD_STEP + 1):
        before = digest(params)
        params, state = step(params, state, batch_of(index, mesh))
        say(
            "by hand",
            finite=bool(state.grads_finite),
            moved=digest(params) != before,
            scale=float(state.loss_scale),
            params=digest(params),
        )


def main(job, port, process, count, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, process)
    say("devices", here=jax.local_device_count(), all=jax.device_count())
    if job == "killed":
        train(folder, pause=True)
        return
    check_same_policy(POLICY)
    record = train(folder)
    if job == "resumed":
        return
    step_by_hand(new_mesh())
    path = Path(folder) / f"bad_{process}.npz"
    record.save(path)
    multihost_utils.sync_global_devices("all have looked for the file")
    say("record", step=int(record.step), exists=path.exists())
    try:
        check_same_policy("mixed_bfloat16" if process else "mixed_float16")
    except ProcessPolicyMismatch as error:
        say("error", message=str(error))


if __name__ == "__main__":
    job, port, process, count, folder = sys.argv[1:]
    main(job, int(port), int(process), int(count), folder)
    # Orbax and gloo have threads that may wait for a process that is gone.
    sys.stdout.flush()
    os._exit(0)
