"""The migration pages: both sides of their diffs run and train alike."""

import ast
import inspect
import itertools
import pkgutil
import re
from pathlib import Path

import flax.training.dynamic_scale
import haiku as hk
import jax
import jax.numpy as jnp
import jmp
import mpx
import numpy as np
import optax
import pytest

import jaxmp

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {page.stem: page.read_text() for page in (DOCS / "coming_from").glob("*.md")}
TABLES = {**PAGES, "index": (DOCS / "coming_from.md").read_text()}
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```", re.M | re.S)


def side(diff, sign):
    """One side of a diff, as source."""
    lines = [line[1:] for line in diff.splitlines() if line[:1] in (sign, " ")]
    return "\n".join(lines).strip("\n") + "\n"


def diffs(page):
    return [code for language, code in BLOCK.findall(PAGES[page]) if language == "diff"]


@pytest.mark.parametrize("page", PAGES)
def test_the_new_side_of_each_diff_is_the_block_that_follows(page):
    blocks = BLOCK.findall(PAGES[page])
    assert diffs(page)
    for (language, code), (_, following) in itertools.pairwise(blocks):
        if language == "diff":
            assert side(code, "+") == following
            ast.parse(side(code, "-"))


# Both sides train alike


def run(page, sign):
    """What a page has defined after one side of its first diff."""
    namespace = {}
    with jax.numpy_rank_promotion("allow"):
        for language, code in BLOCK.findall(PAGES[page]):
            if language == "diff":
                exec(side(code, sign), namespace)
                return namespace
            exec(code, namespace)
    raise AssertionError(f"{page} has no diff")


def train(page, names, steps=5):
    """The losses of some steps, and what they leave under the names of the state."""
    state = [page[name] for name in names]
    batch = [page[name] for name in ("x", "y", "tokens") if name in page]
    losses = []
    for _ in range(steps):
        *state, loss = page["train_step"](*state, *batch)
        losses.append(loss)
    return losses, state


def assert_alike(theirs, ours, rtol=1e-5, atol=1e-7):
    for x, y in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def test_the_step_of_dynamic_scale_trains_alike():
    theirs, ours = run("flax", "-"), run("flax", "+")
    their_losses, [their_state] = train(theirs, ["state"])
    our_losses, [our_state] = train(ours, ["state"])
    assert_alike(their_losses, our_losses)
    assert_alike(their_state.params, our_state.params)
    scale = their_state.dynamic_scale.scale
    assert float(scale) == float(jaxmp.get_loss_scale(our_state))
    # Its first scale is a Python number; ours is an array.
    assert theirs["train_step"]._cache_size() == 2
    assert ours["train_step"]._cache_size() == 1


def test_the_step_of_jmp_trains_alike():
    names = ["params", "opt_state"]
    their_losses, [their_params, _, scale] = train(
        run("jmp", "-"), [*names, "loss_scale"]
    )
    our_losses, [our_params, our_state] = train(run("jmp", "+"), names)
    assert_alike(their_losses, our_losses)
    assert_alike(their_params, our_params)
    assert float(scale.loss_scale) == float(jaxmp.get_loss_scale(our_state))


def test_the_step_of_mpx_trains_alike():
    names = ["model", "opt_state"]
    their_losses, [*_, scale] = train(run("mpx", "-"), [*names, "scaling"])
    our_losses, [_, our_state] = train(run("mpx", "+"), names)
    assert_alike(their_losses, our_losses, rtol=1e-3)
    assert float(scale.loss_scaling) == float(jaxmp.get_loss_scale(our_state))


def test_the_step_of_haiku_trains_alike():
    names = ["params", "opt_state"]
    theirs = run("haiku", "-")
    try:
        their_losses, _ = train(theirs, [*names, "loss_scale"])
    finally:
        hk.mixed_precision.clear_policy(hk.Linear)
    our_losses, _ = train(run("haiku", "+"), names)
    assert_alike(their_losses, our_losses, rtol=1e-3)


def test_the_step_of_a_model_of_transformers_trains_alike():
    names = ["params", "opt_state"]
    with jax.numpy_rank_promotion("allow"):
        their_losses, _ = train(run("hugging_face", "-"), names, steps=2)
        our_losses, _ = train(run("hugging_face", "+"), names, steps=2)
    assert_alike(their_losses, our_losses, rtol=1e-2)


# The tables


def rows(text):
    """The cells of each row of a page's tables, under the headings of their columns."""
    heading = None
    for line in text.splitlines():
        if not line.startswith("|"):
            heading = None
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
        if heading is None:
            heading = cells
        elif not set(line) <= set("|- :"):
            yield dict(zip(heading, cells, strict=True))


def our_code(text):
    """The expressions in the columns that say what jaxmp has."""
    for row in rows(text):
        for column in {"jaxmp", "policy", "here it is"} & set(row):
            yield from re.findall(r"`([^`]+)`", row[column])


CODE = sorted({(page, code) for page in TABLES for code in our_code(TABLES[page])})
MODULES = ("jaxmp", "jaxmp.casting", "jaxmp.optimizers", "jaxmp.sharding")
OF_LOSS_SCALING = inspect.signature(jaxmp.dynamic_loss_scaling).parameters


def found(name):
    """A name of jaxmp, with or without its module; None if it is somebody else's."""
    if name.startswith(("jaxmp.", "training.", "numerics.")):
        return pkgutil.resolve_name("jaxmp." + name.removeprefix("jaxmp."))
    owners = map(pkgutil.resolve_name, MODULES)
    return next((getattr(o, name) for o in owners if hasattr(o, name)), None)


@pytest.mark.parametrize(("page", "code"), CODE)
def test_what_a_table_says_of_jaxmp_is_there(page, code):
    try:
        tree = ast.parse(code, mode="eval")
    except SyntaxError:  # a part of a policy, a keyword, prose
        if match := re.fullmatch(r"(?:params|compute|output|reduce)=[\w=,]*", code):
            jaxmp.get_policy(match.group())
        return
    if isinstance(tree.body, ast.Constant) and isinstance(tree.body.value, str):
        jaxmp.get_policy(tree.body.value)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = found(ast.unparse(node.func))
        if function is None:
            continue
        known = {**inspect.signature(function).parameters}
        if function is jaxmp.loss_scaling:
            known |= OF_LOSS_SCALING
        keywords = {keyword.arg for keyword in node.keywords}
        takes_more = function in (jaxmp.value_and_grad, jaxmp.grad)
        assert takes_more or keywords <= set(known)
        strings = [a.value for a in node.args if isinstance(a, ast.Constant)]
        for spec in (x for x in strings if isinstance(x, str)):
            if function is not jaxmp.register_rule:
                jaxmp.get_policy(spec)


@pytest.mark.parametrize("page", TABLES)
def test_enough_of_the_tables_is_looked_up(page):
    names = [name for code in our_code(TABLES[page]) for name in [code.split("(")[0]]]
    assert sum(found(name) is not None for name in names if name.isidentifier()) >= 4


@pytest.mark.parametrize("row", list(rows(PAGES["lightning"]))[:9])
def test_what_is_said_of_the_precisions_of_lightning(row):
    for name in re.findall(r"`([^`]+)`", row.get("`precision=`", "")):
        name = ast.literal_eval(name) if name != "..." else name
        try:
            policy = jaxmp.get_policy(name)
        except jaxmp.errors.PolicyError:
            assert name not in ("16-mixed", "bf16-mixed", "16-true", "bf16-true")
        else:
            same = policy == jaxmp.get_policy(row["policy"].strip("`").strip('"'))
            assert same == (name != "bf16")


# What the tables say of the others


HISTORIES = np.random.default_rng(0).random((8, 60)) > 0.15


@pytest.mark.parametrize("interval", [1, 2, 3, 7])
def test_scales_move_alike(interval):
    """DynamicScale grows one good step late; jmp and jaxmp grow on the same step."""

    def loss_fn(w, gradient):
        return w * gradient

    flax_scale = flax.training.dynamic_scale.DynamicScale(
        growth_interval=interval - 1,
        scale=jnp.float32(2.0**16),
        fin_steps=jnp.int32(0),
    )
    jmp_scale = jmp.DynamicLossScale(
        jnp.float32(2.0**16), period=interval, min_loss_scale=jnp.float32(2.0**-126)
    )
    tx = jaxmp.loss_scaling(
        optax.sgd(0.0),
        "mixed_float16",
        growth_interval=interval,
        min_scale=2.0**-126,
        max_scale=2.0**126,
    )
    w = jnp.float32(1)

    @jax.jit
    def trajectories(history):
        def step(scales, good):
            flax_scale, (jmp_value, jmp_counter), opt_state = scales
            gradient = jnp.where(good, 1.0, jnp.inf)
            flax_scale = flax_scale.value_and_grad(loss_fn)(w, gradient).dynamic_scale
            # Rebuilt by hand: jmp forgets its minimum wherever JAX flattens it.
            by_jmp = jmp.DynamicLossScale(
                jmp_value, jmp_counter, jmp_scale.period, 2, jmp_scale.min_loss_scale
            ).adjust(good)
            grads = jaxmp.grad(loss_fn)(w, gradient, loss_scale=opt_state)
            _, opt_state = tx.update(grads, opt_state, w)
            ours = opt_state.loss_scale
            scales = flax_scale, (by_jmp.loss_scale, by_jmp.counter), opt_state
            return scales, jnp.stack([flax_scale.scale, by_jmp.loss_scale, ours])

        jmp_state = jmp_scale.loss_scale, jnp.int32(0)
        start = flax_scale, jmp_state, tx.init(w)
        return jax.lax.scan(step, start, history)[1]

    for history in HISTORIES:
        by_flax, by_jmp, ours = trajectories(jnp.asarray(history)).T
        assert len(set(ours.tolist())) > 3
        np.testing.assert_array_equal(ours, by_flax)
        np.testing.assert_array_equal(ours, by_jmp)


def test_a_float16_loss_overflows_the_first_step_of_dynamic_scale_alone():
    def loss_fn(w):
        return w.astype(jnp.float16)

    w = jnp.float32(1)
    scale = flax.training.dynamic_scale.DynamicScale()
    assert not scale.value_and_grad(loss_fn)(w).finite
    state = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16").init(w)
    assert float(jaxmp.grad(loss_fn)(w, loss_scale=state)) == 1


def test_mpx_divides_by_the_next_scale_and_stops_at_no_power_of_two():
    def loss_fn(w):
        return 3.0 * w

    w = jnp.float32(1)
    scaling = mpx.DynamicLossScaling(jnp.float32(8), jnp.float32(1), period=1)
    loss, scaling, _, gradient = mpx.filter_value_and_grad(loss_fn, scaling)(w)
    assert (float(loss), float(gradient), float(scaling.loss_scaling)) == (1.5, 1.5, 16)
    tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16", growth_interval=1)
    state = tx.init(w)
    loss, gradient = jaxmp.value_and_grad(loss_fn)(w, loss_scale=state)
    _, state = tx.update(gradient, state, w)
    assert (float(loss), float(gradient)) == (3, 3)
    assert float(state.loss_scale) == 2.0**17
    largest = mpx.DynamicLossScaling(jnp.float32(2.0**16), jnp.float32(1))
    assert float(largest.adjust(jnp.bool_(True)).loss_scaling) == 65504


def matmuls(fn, *args):
    """The dtypes in which a program multiplies, in its order."""
    program = str(jax.make_jaxpr(fn)(*args))
    return re.findall(r":(\w+)\[[\d,]*\] = dot_general", program)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"function": "Head.__call__"}, ["f16", "f32"]),
        ({"path": "head"}, ["f16", "f32"]),
        ({"path": r"(.*/)?linear(_\d+)?"}, ["f16", "f32"]),
        ({"path": "hidden"}, ["f32", "f16"]),
    ],
)
def test_rules_say_what_a_class_of_haiku_computes_in(rule, expected):
    page = run("haiku", "+")
    rules = [jaxmp.casting.OpRule(compute="float32", **rule)]
    half = jaxmp.autocast(page["model"].apply, "mixed_float16", rules=rules)
    assert matmuls(half, page["params"], page["x"]) == expected


def test_haiku_takes_a_policy_of_jaxmp():
    page = run("haiku", "+")
    hk.mixed_precision.set_policy(hk.Linear, jaxmp.get_policy("mixed_float16"))
    try:
        for apply in (
            page["model"].apply,
            jaxmp.autocast(page["model"].apply, "mixed_float16"),
        ):
            assert matmuls(apply, page["params"], page["x"]) == ["f16", "f16"]
    finally:
        hk.mixed_precision.clear_policy(hk.Linear)


def test_full_precision_decorates_a_method_of_haiku():
    class Head(hk.Module):
        @jaxmp.full_precision
        def __call__(self, x):
            return hk.Linear(4)(x)

    model = hk.without_apply_rng(hk.transform(lambda x: Head()(hk.Linear(4)(x))))
    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)
    half = jaxmp.autocast(model.apply, "mixed_float16")
    assert matmuls(half, params, x) == ["f16", "f32"]


def test_a_custom_derivative_is_full_or_half_as_a_whole():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(
        lambda x, w: (x @ w, (x, w)),
        lambda kept, cotangent: (cotangent @ kept[1].T, kept[0].T @ cotangent),
    )
    x = jnp.ones((4, 4))
    for wrap, dtype in ((jaxmp.full_precision, "f32"), (jaxmp.half_operands, "f16")):
        wrapped = wrap(product)

        def loss_fn(w, x, wrapped=wrapped):
            return jnp.sum(wrapped(x, w))

        gradient = jax.grad(jaxmp.autocast(loss_fn, "mixed_float16"))
        assert set(matmuls(gradient, x, x)) == {dtype}


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("float32", jax.lax.Precision.HIGHEST),
        ("tf32", jax.lax.Precision.HIGH),
        ("BF16_BF16_F32", jax.lax.DotAlgorithmPreset.BF16_BF16_F32),
    ],
)
def test_matmul_precisions_are_those_of_set_float32_matmul_precision(name, precision):
    assert jaxmp.get_policy(f"float32,matmul={name}").lax_precision == precision
    x = jnp.ones((4, 4))
    program = jax.make_jaxpr(jaxmp.autocast(jnp.dot, f"float32,matmul={name}"))(x, x)
    (equation,) = program.eqns[-1:]
    found = equation.params["precision"]
    assert found in (precision, (precision, precision))
