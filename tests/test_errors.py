"""Every exception is documented, used, and says what was wrong and what to do."""

import ast
import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import serialization

import jaxmp
from jaxmp import errors
from jaxmp.report import has_target, target_devices
from jaxmp.training import restore

CLASSES = {name: x for name, x in vars(errors).items() if inspect.isclass(x)}
ERRORS = [name for name, x in CLASSES.items() if not issubclass(x, Warning)]
KINDS = (
    errors.InstallationError,
    errors.PolicyError,
    errors.ModuleError,
    errors.AutocastError,
    errors.LossScaleError,
    errors.GradientError,
    errors.OptimizerError,
    errors.ShardingError,
    errors.CheckpointError,
    errors.NumericsError,
    errors.ReportError,
)
PACKAGE = Path(errors.__file__).parent


def classes_made_in_the_package():
    """Names that are called, or passed on as the category of a warning."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                for part in (node.func, *node.args, *(k.value for k in node.keywords)):
                    match part:
                        case ast.Name(id=name) | ast.Attribute(attr=name):
                            yield name


def test_every_class_is_raised_somewhere():
    unused = set(CLASSES) - set(classes_made_in_the_package())
    assert unused <= {"JaxmpError", *(kind.__name__ for kind in KINDS)}


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_says_in_one_line_which_mistake_it_stands_for(name):
    doc = vars(CLASSES[name])["__doc__"]
    assert doc.endswith(".")
    assert len(doc.splitlines()) == 1


@pytest.mark.parametrize("name", ERRORS[1:])
def test_every_error_is_caught_by_the_base_class_of_its_kind(name):
    assert issubclass(CLASSES[name], KINDS)
    assert issubclass(CLASSES[name], errors.JaxmpError)


@pytest.mark.parametrize("name", ERRORS[1:])
def test_every_error_that_is_raised_is_caught_by_a_builtin_one(name):
    builtin = set(CLASSES[name].__mro__) - set(CLASSES.values()) - {Exception}
    is_builtin = any(issubclass(base, Exception) for base in builtin)
    assert is_builtin or CLASSES[name] in KINDS


@pytest.mark.parametrize("name", sorted(set(CLASSES) - set(ERRORS)))
def test_a_warning_is_no_error(name):
    assert issubclass(CLASSES[name], UserWarning)
    assert not issubclass(CLASSES[name], errors.JaxmpError)


# Bad input, and the words that name the value and the repair

params = {"w": jnp.ones(2)}
tx = jaxmp.loss_scaling(optax.sgd(0.1), "mixed_float16")
state = tx.init(params)


def loss_fn(params):
    return jnp.sum(params["w"])


def value_and_grad(fun, **kwargs):
    return jaxmp.value_and_grad(fun, **kwargs)(params, loss_scale=state)


def scaling(**options):
    return jaxmp.dynamic_loss_scaling(optax.sgd(0.1), **options)


def train_state(policy):
    return jaxmp.TrainState.create(
        apply_fn=None, params=params, tx=optax.adam(0.1), policy=policy
    )


def resume(policy, saved_policy):
    saved = serialization.to_state_dict(train_state(saved_policy))
    return restore(train_state(policy), saved)


def collapse(loss):
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update({"w": jnp.full(2, jnp.nan)}, state, params, value=loss)
    jaxmp.raise_if_collapsed(state, max_consecutive_skips=3)


def two_layers(w):
    return jnp.sum(jnp.tanh(jnp.ones((16, 16)) @ w) @ w)


BAD_INPUT = {
    "policy string": (
        lambda: jaxmp.get_policy("p=f32,c=bf17"),
        errors.PolicyError,
        ("'bf17'", "'p=f32,c=bf17'", "Did you mean 'bf16'?", "float8_e5m2"),
    ),
    "negative scale": (
        lambda: scaling(init_scale=-2.0),
        errors.LossScaleOptionError,
        ("init_scale=-2.0", "Use a power of two"),
    ),
    "scale that is not a power of two": (
        lambda: scaling(init_scale=1000.0),
        errors.LossScaleOptionError,
        ("init_scale=1000.0", "Use 512 or 1024"),
    ),
    "growth factor": (
        lambda: scaling(growth_factor=1.0),
        errors.LossScaleOptionError,
        ("growth_factor=1.0", "such as 2.0"),
    ),
    "min above max": (
        lambda: scaling(min_scale=2.0**17, max_scale=2.0**16),
        errors.LossScaleOptionError,
        ("min_scale=131072.0", "max_scale=65536.0", "min_scale <= init_scale"),
    ),
    "state without a scale": (
        lambda: jaxmp.value_and_grad(loss_fn)(
            params, loss_scale=optax.adam(0.1).init(params)
        ),
        errors.MissingLossScale,
        ("tuple", "jaxmp.loss_scaling(optimizer, policy)"),
    ),
    "call without a scale": (
        lambda: jaxmp.value_and_grad(loss_fn)(params),
        errors.MissingLossScaleArgument,
        ("without loss_scale=", "value_and_grad(loss_fn)", "loss_scale=opt_state"),
    ),
    "loss with axes": (
        lambda: value_and_grad(lambda params: params["w"]),
        errors.NonScalarLoss,
        ("shape (2,)", "float32", "jnp.mean"),
    ),
    "loss that is a pair": (
        lambda: value_and_grad(lambda params: (loss_fn(params), 1)),
        errors.NonScalarLoss,
        ("a tuple", "has_aux=True"),
    ),
    "integer loss": (
        lambda: value_and_grad(lambda params: jnp.int32(3)),
        errors.NonFloatingLoss,
        ("int32", "loss.astype(jnp.float32)"),
    ),
    "axis without a mesh": (
        lambda: value_and_grad(loss_fn, data_axes="data"),
        errors.DataAxesError,
        ("data_axes='data'", "jax.set_mesh(mesh)"),
    ),
    "option without an axis": (
        lambda: value_and_grad(loss_fn, gather="window"),
        errors.DataAxesOptionError,
        ("gather='window'", "data_axes='data'"),
    ),
    "missing aux": (
        lambda: value_and_grad(loss_fn, has_aux=True),
        errors.MissingAux,
        ("loss_fn", "shape ()", "(loss, aux)"),
    ),
    "two scales": (
        lambda: jaxmp.loss_scaling(tx, "mixed_float16").init(params),
        errors.MultipleLossScales,
        ("2 loss scales", "outermost", "loss_scaling(optax.chain("),
    ),
    "gradients of another tree": (
        lambda: tx.update({"v": jnp.ones(2)}, state, params),
        errors.GradientTreeMismatch,
        ("'v'", "no parameter of that name", "same tree"),
    ),
    "checkpoint of another policy": (
        lambda: resume("mixed_bfloat16", "mixed_float16"),
        errors.CheckpointPolicyMismatch,
        ("'p=full,c=f16,o=full'", "'p=full,c=bf16,o=full'", "convert=True"),
    ),
    "checkpoint without a policy": (
        lambda: restore(train_state("float32"), {"params": 1}),
        errors.InvalidCheckpoint,
        ("['params']", "str(policy)"),
    ),
    "JAX version": (
        lambda: jaxmp._jaxpr.versions.check_jax_version("0.4.30"),
        errors.UnsupportedJaxVersion,
        ("0.4.30", "0.10.0", "pip install --upgrade"),
    ),
    "predicate": (
        lambda: jaxmp.select_tree(jnp.ones(2), params, params),
        errors.SelectPredicateError,
        ("float32", "shape (2,)", "all_finite()"),
    ),
    "collapse of the forward": (
        lambda: collapse(jnp.float32(jnp.nan)),
        errors.LossScaleCollapsed,
        ("last 3 steps", "8192", "loss itself was non-finite", "bfloat16"),
    ),
    "collapse of the gradients": (
        lambda: collapse(jnp.float32(1)),
        errors.LossScaleCollapsed,
        ("last 3 steps", "only gradients overflowed", "min_scale"),
    ),
    "axis that nothing binds": (
        lambda: jaxmp.sharding.reduce_gradients(params, "data"),
        errors.UnknownAxis,
        ("'data'", "jax.shard_map(fn, mesh=mesh, ...)", "Under jit"),
    ),
    "unscaled float16 sum": (
        lambda: jaxmp.sharding.reduce_gradients(params, "data", dtype="float16"),
        errors.ReduceDtypeError,
        ("float16 without a loss scale", "loss_scale=opt_state", "dtype='bfloat16'"),
    ),
    "policy in float8": (
        lambda: jaxmp.get_policy("float8_e4m3fn"),
        errors.PolicyError,
        ("compute_dtype=float8_e4m3fn", "without a scale", "'mixed_fp8'"),
    ),
    "reserved format": (
        lambda: jaxmp.get_policy("mixed_fp8:mx"),
        errors.PolicyError,
        ("'fp8:mx'", "MXFP8", "fp8:rowwise"),
    ),
    "second derivative of a float8 matmul": (
        lambda: jax.hessian(jaxmp.autocast(two_layers, "mixed_fp8"))(
            jnp.ones((16, 16))
        ),
        errors.NoSecondDerivative,
        ("float8_e4m3fn", "twice", "'mixed_bfloat16'", "OpRule(path=..., quantize="),
    ),
    "compile target": (
        lambda: has_target("h200"),
        errors.UnknownTarget,
        ("'h200'", "h100", "tpu-v5e"),
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_with_its_value_and_its_repair(case):
    provoke, cls, words = BAD_INPUT[case]
    with pytest.raises(errors.JaxmpError) as caught:
        provoke()
    assert type(caught.value) is cls
    for word in words:
        assert word in str(caught.value)


def test_nothing_is_lost_on_bad_input():
    before = {"params": params["w"], "scale": state.loss_scale}
    for provoke, _, _ in BAD_INPUT.values():
        with pytest.raises(errors.JaxmpError):
            provoke()
    assert state.loss_scale is before["scale"]
    updates, after = tx.update({"w": jnp.ones(2)}, state, params)
    assert int(after.applied_steps) == 1
    assert bool(jnp.all(optax.apply_updates(params, updates)["w"] == 0.9))


def test_a_missing_compiler_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(errors.MissingTargetPackage) as caught:
        target_devices("tpu-v5e")
    for word in ("'tpu-v5e'", "libtpu", "pip install 'jaxmp[targets]'"):
        assert word in str(caught.value)


def test_an_environment_without_what_the_compilers_need_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "0")
    with pytest.raises(errors.MissingTargetPackage) as caught:
        target_devices("tpu-v5e")
    for word in ("'tpu-v5e'", "['TPU_SKIP_MDS_QUERY']", "compile_step"):
        assert word in str(caught.value)
