"""Random programs: what is decided in one place does not depend on others.

- One operation that stays in float32, wherever it is, keeps no other out of half.
- What is decided about a program does not depend on code that shares no value with it.
"""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from jaxmp._jaxpr.atoms import is_literal
from jaxmp.casting.explanation.shares import shares_of
from jaxmp.casting.plan.plan import JaxprPlan
from jaxmp.casting.planner._whole_function import plan_jaxpr, read_settings
from tests.support.programs.random_programs import (
    HALF,
    PROGRAMS,
    arguments,
    examples,
    gradient,
    loss_of,
)
from tests.support.programs.run import run_step
from tests.support.programs.whole import FLOAT64, WHOLE

POLICIES = pytest.mark.parametrize("policy", HALF)

# One operation that stays in float32


def places(steps):
    """The paths to every place of a program, those in its blocks included."""
    for i in range(len(steps) + 1):
        yield (i,)
    for i, step in enumerate(steps):
        if isinstance(step[-1], list):
            yield from ((i, *place) for place in places(step[-1]))


def inserted(steps, place, step):
    """A program with one more step at a place."""
    i, *rest = place
    if not rest:
        return [*steps[:i], step, *steps[i:]]
    block = (*steps[i][:-1], inserted(steps[i][-1], rest, step))
    return [*steps[:i], block, *steps[i + 1 :]]


def planned(fn, policy, *args):
    settings = read_settings(policy, (), True)
    return plan_jaxpr(jax.make_jaxpr(fn)(*args), settings)[0]


def check_locality(program, name, where, policy):
    """The other matmuls are in half as they are with a mere move in that place."""
    steps, n = program
    found = list(places(steps))
    place = found[where % len(found)]
    for transform in (lambda fn: fn, gradient):
        bare, actual = (
            shares_of(
                planned(
                    transform(loss_of(inserted(steps, place, (name, -1)))),
                    policy,
                    *arguments(n),
                )
            )
            for name in ("moved", name)
        )
        assert actual.half >= bare.half, (place, bare, actual)


PLACES = st.integers(0, 99)


@POLICIES
@examples(8, program=PROGRAMS, name=st.sampled_from(sorted(WHOLE)), where=PLACES)
def test_one_operation_keeps_no_other_from_half(policy, program, name, where):
    check_locality(program, name, where, policy)


@examples(2, program=PROGRAMS, where=PLACES)
def test_float64_keeps_no_other_from_half(program, where):
    with jax.enable_x64(True):
        for name in FLOAT64:
            check_locality(program, name, where, "mixed_bfloat16")


@pytest.mark.slow
@POLICIES
@examples(15, program=PROGRAMS, name=st.sampled_from(sorted(WHOLE)), where=PLACES)
def test_one_operation_keeps_no_other_from_half_in_many_programs(
    policy, program, name, where
):
    check_locality(program, name, where, policy)


# Other code around a program


def decisions(plan, own=None):
    """What is decided about each equation, those inside of calls included."""
    for eqn in plan.eqns:
        if own is not None and not own.intersection(eqn.eqn.outvars):
            continue
        dtypes = [None if s is None else s.dtype for s in eqn.out_states]
        yield eqn.eqn.primitive.name, eqn.op_class, eqn.reason, eqn.in_dtypes, dtypes
        call = getattr(eqn.call, "primal", eqn.call)
        for body in call if isinstance(call, tuple) else (call,):
            if isinstance(body, JaxprPlan):
                yield from decisions(body)


def behind(jaxpr, outs):
    """The values that some outputs of a jaxpr are made of."""
    found = {v for v in outs if not is_literal(v)}
    for eqn in reversed(jaxpr.eqns):
        if found.intersection(eqn.outvars):
            found.update(v for v in eqn.invars if not is_literal(v))
    return found


ORDERS = st.one_of(
    st.just([0] * 9), st.just([1] * 9), st.lists(st.integers(0, 1), max_size=12)
)


def side_by_side(programs, order):
    """The pools of programs that are run step by step in an order, and a loss."""

    def run(*args):
        pools = [[x] for _, x in args]
        left = [iter(steps) for steps, _ in programs]
        for which in (*order, *[0] * 99, *[1] * 99):
            step = next(left[which], None) if which < len(left) else None
            if step is not None:
                w, n = args[which][0], programs[which][1]
                pools[which].append(run_step(step, pools[which], w, n))
        return sum(jnp.mean(jnp.sin(y)) for pool in pools for y in pool[1:]), pools

    return run


def values(run):
    """What belongs to each of the programs."""
    return lambda *args: run(*args)[1]


def values_and_gradients(run):
    def both(*args):
        grads, pools = jax.grad(lambda args: run(*args), has_aux=True)(args)
        return list(zip(pools, grads, strict=True))

    return both


def check_independence(program, other, order, policy):
    """The same is decided about a program alone and next to another."""
    count = len(program[0]) + 1
    for transform, outs in ((values, count), (values_and_gradients, count + 2)):
        found = []
        for programs in ([program], [program, other]):
            args = [arguments(0, seed)[:2] for seed, _ in enumerate(programs)]
            plan = planned(transform(side_by_side(programs, order)), policy, *args)
            own = behind(plan.jaxpr, plan.jaxpr.outvars[:outs])
            found.append(list(decisions(plan, own)))
        assert found[0] == found[1]


@POLICIES
@examples(8, program=PROGRAMS, other=PROGRAMS, order=ORDERS)
def test_a_plan_does_not_depend_on_other_code(policy, program, other, order):
    check_independence(program, other, order, policy)


@pytest.mark.slow
@POLICIES
@examples(6, program=PROGRAMS, other=PROGRAMS, order=ORDERS)
def test_a_plan_does_not_depend_on_other_code_in_many_programs(
    policy, program, other, order
):
    check_independence(program, other, order, policy)
