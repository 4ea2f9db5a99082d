"""Every gradient transformation that Optax exports, with what it needs to run.

`test_every_optimizer.py` crosses this list with the properties that all of them keep.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib


def nothing(grads):
    return {}


def with_value(grads):
    return {"value": sum(jnp.vdot(g, g) for g in jax.tree.leaves(grads)) + 1.0}


def objective(params):
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))


def with_objective(grads):
    return {"obj_fn": objective}


def with_line_search(grads):
    return {**with_value(grads), "grad": grads, "value_fn": objective}


def with_grad_function(grads):
    return {"grad_fn": lambda params, step: jax.tree.map(jnp.ones_like, params)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One transformation: how it is made, and what `update` needs besides."""

    name: str
    make: Callable[[], Any]
    extra: Callable[[Any], dict[str, Any]] = nothing
    per_example: bool = False
    lookahead: bool = False
    # Its updates do not depend continuously on the gradients, so two programs that
    # differ in the last bit diverge.
    chaotic: bool = False

    def __str__(self):
        return self.name

    def params(self, dtype):
        leaves = {
            "w": np.linspace(-1.0, 1.5, 24).reshape(4, 6),
            "b": np.linspace(0.1, 0.6, 6),
        }
        params = {name: jnp.asarray(x, dtype) for name, x in leaves.items()}
        return optax.LookaheadParams.init_synced(params) if self.lookahead else params

    def grads(self, steps, seed=0):
        rng = np.random.default_rng(seed)
        batch = (3,) if self.per_example else ()
        shapes = {"w": (4, 6), "b": (6,)}
        return {
            name: jnp.asarray(rng.normal(size=(steps, *batch, *shape)), jnp.float32)
            for name, shape in shapes.items()
        }


def by_name(module, names, **kwargs):
    return [
        Case(name, functools.partial(getattr(module, name), **kwargs))
        for name in names.split()
    ]


def sgd():
    return optax.sgd(1e-2, momentum=0.9)


def labels(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, params)


def only_weights(params):
    return jax.tree.map(lambda name: name == "w", labels(params))


def on_even_steps(step, *_, **__):
    return step % 2 == 0


def seen_once(tx):
    """`optax.monitor` adds entries to its state in the first update."""

    def init(params):
        grads = jax.tree.map(jnp.zeros_like, params)
        return tx.update(grads, tx.init(params), params)[1]

    return tx._replace(init=init)


def muon_dimensions(params):
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), params)


ALIASES = [
    *by_name(
        optax,
        """
    adabelief adadelta adagrad adam adamax adamaxw adamw adan amsgrad lamb lars lion
    nadam nadamw novograd optimistic_adam_v2 optimistic_gradient_descent radam
    rmsprop rprop sgd sign_sgd signum sm3 yogi
    """,
        learning_rate=1e-2,
    ),
    Case("fromage", lambda: optax.fromage(1e-2)),
    Case("adafactor", lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4)),
    Case("noisy_sgd", lambda: optax.noisy_sgd(1e-2, key=7)),
    Case("optimistic_adam", lambda: optax.optimistic_adam(1e-2, optimism=0.5)),
    Case("polyak_sgd", optax.polyak_sgd, with_value),
    Case("lbfgs", optax.lbfgs, with_line_search, chaotic=True),
    Case("lbfgs without line search", lambda: optax.lbfgs(1e-2, linesearch=None)),
]

CONTRIB = [
    *by_name(
        contrib,
        """
    acprop ademamix adopt dadapt_adamw dog dowg madgrad muon prodigy
    schedule_free_adamw schedule_free_sgd simplified_ademamix
    """,
        learning_rate=1e-2,
    ),
    Case("cocob", contrib.cocob),
    Case("galore", lambda: contrib.galore(1e-2, rank=2)),
    Case("momo", lambda: contrib.momo(1e-2), with_value),
    Case("momo_adam", lambda: contrib.momo_adam(1e-2), with_value),
    Case("sophia", lambda: contrib.sophia(1e-2), with_objective),
    Case(
        "dpsgd",
        lambda: contrib.dpsgd(1e-2, l2_norm_clip=1.0, noise_multiplier=0.1, seed=3),
        per_example=True,
    ),
]

BLOCKS = (
    by_name(
        optax,
        """
    centralize identity keep_params_nonnegative normalize_by_update_norm
    scale_by_adadelta scale_by_adam scale_by_adamax scale_by_adan scale_by_amsgrad
    scale_by_belief scale_by_lion scale_by_novograd
    scale_by_optimistic_gradient
    scale_by_radam scale_by_rms scale_by_rss scale_by_sign scale_by_sm3
    scale_by_stddev scale_by_trust_ratio scale_by_yogi set_to_zero zero_nans
    """,
    )
    + by_name(
        contrib,
        """
    normalize scale_by_acprop scale_by_ademamix scale_by_adopt scale_by_cocob
    scale_by_simplified_ademamix
    """,
    )
    + [
        # Their updates grow with the weights, and so does every rounding.
        Case("scale_by_lbfgs", optax.scale_by_lbfgs, chaotic=True),
        Case(
            "scale_by_param_block_norm", optax.scale_by_param_block_norm, chaotic=True
        ),
        Case("scale_by_param_block_rms", optax.scale_by_param_block_rms, chaotic=True),
        Case("adaptive_grad_clip", lambda: optax.adaptive_grad_clip(0.1)),
        Case("add_decayed_weights", lambda: optax.add_decayed_weights(1e-2)),
        Case("add_noise", lambda: optax.add_noise(0.1, 0.5, key=5)),
        Case("apply_every", lambda: optax.apply_every(3)),
        Case("clip", lambda: optax.clip(0.5)),
        Case("clip_by_block_rms", lambda: optax.clip_by_block_rms(0.5)),
        Case("clip_by_global_norm", lambda: optax.clip_by_global_norm(0.5)),
        Case("ema", lambda: optax.ema(0.9)),
        Case("trace", lambda: optax.trace(0.9)),
        Case("scale", lambda: optax.scale(-0.1)),
        Case("scale_by_learning_rate", lambda: optax.scale_by_learning_rate(0.1)),
        Case("scale_by_rprop", lambda: optax.scale_by_rprop(1e-2)),
        Case(
            "scale_by_distance_over_gradients",
            optax.scale_by_distance_over_gradients,
        ),
        Case(
            "scale_by_schedule",
            lambda: optax.scale_by_schedule(optax.linear_schedule(-0.1, 0.0, 40)),
        ),
        Case("scale_by_factored_rms", optax.scale_by_factored_rms),
        Case("scale_by_polyak", optax.scale_by_polyak, with_value),
        Case(
            "scale_by_backtracking_linesearch",
            lambda: optax.chain(
                optax.sgd(1e-2),
                optax.scale_by_backtracking_linesearch(max_backtracking_steps=5),
            ),
            with_line_search,
            chaotic=True,
        ),
        Case(
            "scale_by_zoom_linesearch",
            lambda: optax.chain(
                optax.sgd(1e-2), optax.scale_by_zoom_linesearch(max_linesearch_steps=5)
            ),
            with_line_search,
            chaotic=True,
        ),
        Case("stateless", lambda: optax.stateless(lambda g, p: g)),
        Case(
            "stateless_with_tree_map",
            lambda: optax.stateless_with_tree_map(lambda g, p: g - 0.1 * p),
        ),
        Case("scale_by_galore", lambda: contrib.scale_by_galore(rank=2)),
        Case(
            "scale_by_muon",
            lambda: optax.masked(
                contrib.scale_by_muon(weight_dimension_numbers=muon_dimensions),
                only_weights,
            ),
            chaotic=True,
        ),
        Case("scale_by_madgrad", lambda: contrib.scale_by_madgrad(1e-2)),
        Case("reduce_on_plateau", contrib.reduce_on_plateau, with_value),
        Case(
            "hutchinson_estimator_diag_hessian",
            contrib.hutchinson_estimator_diag_hessian,
            with_objective,
        ),
        Case(
            "differentially_private_aggregate",
            lambda: contrib.differentially_private_aggregate(1.0, 0.1, key=3),
            per_example=True,
        ),
    ]
)

WRAPPERS = [
    Case("apply_if_finite", lambda: optax.apply_if_finite(sgd(), 3)),
    Case("chain", lambda: optax.chain(optax.clip_by_global_norm(1.0), sgd())),
    Case(
        "named_chain", lambda: optax.named_chain(("a", optax.clip(1.0)), ("b", sgd()))
    ),
    Case("conditionally_mask", lambda: optax.conditionally_mask(sgd(), on_even_steps)),
    Case(
        "conditionally_transform",
        lambda: optax.conditionally_transform(sgd(), on_even_steps),
    ),
    Case("flatten", lambda: optax.flatten(sgd())),
    Case("freeze", lambda: optax.chain(sgd(), optax.freeze({"w": True, "b": False}))),
    Case("masked", lambda: optax.masked(sgd(), only_weights)),
    Case(
        "multi_transform",
        lambda: optax.multi_transform({"w": sgd(), "b": optax.adam(1e-2)}, labels),
    ),
    Case(
        "partition",
        lambda: optax.partition({"w": sgd(), "b": optax.set_to_zero()}, labels),
    ),
    Case(
        "selective_transform",
        lambda: optax.selective_transform(sgd(), freeze_mask={"w": False, "b": True}),
    ),
    Case(
        "inject_hyperparams",
        lambda: optax.inject_hyperparams(optax.adamw)(
            optax.linear_schedule(1e-2, 0.0, 40)
        ),
    ),
    Case(
        "inject_stateful_hyperparams",
        lambda: optax.inject_stateful_hyperparams(optax.adamw)(1e-2),
    ),
    Case("lookahead", lambda: optax.lookahead(sgd(), 4, 0.5), lookahead=True),
    Case("MultiSteps", lambda: optax.MultiSteps(sgd(), 3)),
    Case("with_extra_args_support", lambda: optax.with_extra_args_support(sgd())),
    Case(
        "measure_with_ema",
        lambda: optax.chain(
            sgd(),
            seen_once(
                optax.monitor({"n": optax.measure_with_ema(optax.tree.norm, 0.9)})
            ),
        ),
    ),
    Case(
        "snapshot",
        lambda: optax.chain(sgd(), optax.snapshot("norm", optax.tree.norm)),
    ),
    Case(
        "monitor",
        lambda: optax.chain(sgd(), seen_once(optax.monitor({"norm": optax.tree.norm}))),
    ),
    Case("mechanize", lambda: contrib.mechanize(sgd(), weight_decay=0.0)),
    Case("sam", lambda: contrib.sam(sgd(), optax.sgd(0.05), sync_period=2)),
    Case(
        "sam, opaque",
        lambda: contrib.sam(sgd(), optax.sgd(0.05), sync_period=2, opaque_mode=True),
        with_grad_function,
    ),
    Case("schedule_free", lambda: contrib.schedule_free(sgd(), 1e-2)),
    Case(
        "split_real_and_imaginary",
        lambda: contrib.split_real_and_imaginary(optax.adam(1e-2)),
    ),
]

CASES = ALIASES + CONTRIB + BLOCKS + WRAPPERS


# Transformations whose annotation does not say so.
UNANNOTATED = {
    "MultiSteps",
    "dog",
    "dowg",
    "hutchinson_estimator_diag_hessian",
    "monitor",
    "nadam",
    "nadamw",
    "scale_by_factored_rms",
}


def exported():
    """Names of what Optax says returns a gradient transformation."""
    found = set(UNANNOTATED)
    for module in (optax, contrib):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                returned = str(inspect.signature(value).return_annotation)
                if "GradientTransformation" in returned:
                    found.add(name)
    return found
