"""Each network of the zoo is traced and run once per policy, for all the tests."""

import functools
import re
from typing import Any, NamedTuple

import jax
import optax
import pytest
from flax import nnx

import jaxmp
from jaxmp.testing._functional import path_of

# Compiling is most of the time, and most of that is LLVM's optimisation.
FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


class Step(NamedTuple):
    """A training step of one network under one policy."""

    function: Any
    arguments: Any
    params: Any
    layers: dict[str, list[Any]]
    jaxpr: Any
    results: Any


def module_under(model, policy):
    """The network with a policy applied, or as it is for None; nnx abstractly."""
    module = nnx.eval_shape(model.make) if model.kind == "nnx" else model.make()
    if policy is None:
        return module
    rules = model.rules(jaxmp.get_policy(policy))
    return jaxmp.apply_policy(module, policy, rules=rules)


@functools.cache
def trace_step(model, policy):
    """Traces `(trained, frozen, opt_state, state)` -> the same four, and results."""
    layers: dict[str, list[Any]] = {}
    apply, params, state = model.functional(module_under(model, policy), layers)
    optimizer = jaxmp.loss_scaling(
        jaxmp.master_weights(optax.sgd(1e-2)), policy or "float32", init_scale=2.0**15
    )
    is_frozen = [
        bool(model.frozen and re.fullmatch(model.frozen, path_of(path)))
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]

    def split(params):
        leaves, structure = jax.tree.flatten(params)
        pairs = list(zip(leaves, is_frozen, strict=True))
        trained = [None if frozen else leaf for leaf, frozen in pairs]
        frozen = [leaf if frozen else None for leaf, frozen in pairs]
        return structure.unflatten(trained), structure.unflatten(frozen)

    def join(trained, frozen):
        def first(a, b):
            return b if a is None else a

        return jax.tree.map(first, trained, frozen, is_leaf=lambda x: x is None)

    def step(trained, frozen, opt_state, state):
        def loss_fn(trained):
            with jax.named_scope("model"):
                output, new_state = apply(join(trained, frozen), state, *model.inputs)
            return model.loss(output, model.target), (output, new_state)

        value_and_grad = jaxmp.value_and_grad(loss_fn, has_aux=True)
        (loss, (output, new_state)), grads = value_and_grad(
            trained, loss_scale=opt_state
        )
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        results = {"loss": loss, "output": output, "grads": grads, "state": new_state}
        return (trained, frozen, opt_state, new_state), results

    trained, frozen = split(params)
    arguments = (trained, frozen, optimizer.init(trained), state)
    traced = jax.jit(step).trace(*arguments)
    return Step(step, arguments, params, layers, traced.jaxpr, traced.out_info)


@functools.cache
def run_step(model, policy, perturbed_in=None):
    """Runs a step three times; returns the first results and how often it compiled.

    `perturbed_in` rounds the parameters to a dtype first, which shows how much the
    network amplifies an error that no computation in that dtype can avoid.
    """
    step = trace_step(model, policy)
    compiled = _compiled(model, policy)
    arguments = step.arguments
    if perturbed_in is not None:
        rounded = jax.tree.map(
            lambda x: x.astype(perturbed_in).astype(x.dtype), arguments[0]
        )
        return compiled(rounded, *arguments[1:])[1], 1
    arguments, results = compiled(*arguments)
    for _ in range(2):
        arguments, _ = compiled(*arguments)
    return results, compiled._cache_size()


@functools.cache
def _compiled(model, policy):
    # Without its optimisations the CPU adds the gradient of a bias up in float16, with
    # one rounding for each addend.
    options = None if policy == "mixed_float16" else FAST_COMPILE
    return jax.jit(trace_step(model, policy).function, compiler_options=options)


@pytest.fixture(name="trace_step", scope="session")
def trace_step_fixture():
    return trace_step


@pytest.fixture(name="run_step", scope="session")
def run_step_fixture():
    return run_step
