"""Every public name is there, documented, annotated and as it was promised."""

import ast
import importlib
import inspect
import itertools
import pkgutil
import re
import tomllib
from pathlib import Path

import jax
import pytest

import jaxmp

SOURCE = Path(jaxmp.__file__).parent
ROOT = Path(__file__).parent.parent
API_PAGE = ROOT / "docs" / "api.md"

# Policies choose from it by name, and nobody calls it.
NOT_PUBLIC = ("jaxmp.quantization",)


def public_modules():
    """The package, its subpackages, and what in them lists names of its own."""
    yield "jaxmp"
    for module in pkgutil.walk_packages(jaxmp.__path__, "jaxmp."):
        is_private = any(part.startswith("_") for part in module.name.split("."))
        is_private = is_private or module.name in NOT_PUBLIC
        is_nested = module.name.count(".") > 1
        if not is_private and (not is_nested or names_of(module.name)):
            yield module.name


def names_of(module):
    """What a module's `__all__` lists; `errors` lists nothing but its classes."""
    if module == "jaxmp.errors":
        return [n for n, x in vars(jaxmp.errors).items() if inspect.isclass(x)]
    return getattr(importlib.import_module(module), "__all__", [])


MODULES = list(public_modules())
NAMES = [f"{module}.{name}" for module in MODULES for name in names_of(module)]


def look_up(path):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name, None)


def unique_objects(is_kind):
    """The public objects of a kind, each once, under its shortest path."""
    found = {}
    for path in sorted(NAMES, key=lambda path: path.count(".")):
        value = look_up(path)
        # None stands for a name that is missing, which has a test of its own.
        if value is not None and is_kind(value):
            found.setdefault((id(value), path.rsplit(".", 1)[1]), path)
    return list(found.values())


FUNCTIONS = unique_objects(inspect.isroutine)
CLASSES = unique_objects(inspect.isclass)
EXCEPTIONS = [path for path in CLASSES if issubclass(look_up(path), Exception)]
CONSTANTS = unique_objects(
    lambda x: not (inspect.isroutine(x) or inspect.isclass(x) or inspect.ismodule(x))
)


def methods():
    for path in CLASSES:
        for name, value in vars(look_up(path)).items():
            value = getattr(value, "__func__", value)
            is_written_here = inspect.isfunction(value) and str(SOURCE) in str(
                value.__code__.co_filename
            )
            if is_written_here and not name.startswith("_"):
                yield f"{path}.{name}", value
            if isinstance(value, property) and not name.startswith("_"):
                yield f"{path}.{name}", value.fget


METHODS = dict(methods())


def section(docstring, title):
    return re.search(rf"^\s*{title}:\n\s+\S", docstring, re.MULTILINE)


# Names


@pytest.mark.parametrize("module", MODULES)
def test_a_public_module_says_what_it_is_and_lists_its_names(module):
    imported = importlib.import_module(module)
    assert imported.__doc__.strip()
    names = names_of(module)
    assert len(set(names)) == len(names) > 0


@pytest.mark.parametrize("path", NAMES)
def test_every_public_name_can_be_imported(path):
    module, name = path.rsplit(".", 1)
    namespace = {}
    exec(f"from {module} import {name}", namespace)
    assert not name.startswith("_")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'polcy'"):
        _ = jaxmp.polcy


def test_nothing_public_belongs_to_another_library():
    for path in (*FUNCTIONS, *CLASSES):
        assert look_up(path).__module__.startswith("jaxmp"), path


# Words


@pytest.mark.parametrize("path", FUNCTIONS)
def test_a_function_documents_arguments_result_and_an_example(path):
    function = look_up(path)
    doc = inspect.getdoc(function)
    assert doc.splitlines()[0].endswith(".")
    signature = inspect.signature(function)
    if signature.parameters:
        assert section(doc, "Args")
    for name in signature.parameters:
        assert re.search(rf"^\s+\**{name}: \S", doc, re.MULTILINE), name
    if signature.return_annotation not in (None, "None"):
        assert section(doc, "Returns")
    assert section(doc, "Example")
    assert ">>> " in doc


@pytest.mark.parametrize("path", CLASSES)
def test_a_class_is_documented(path):
    cls = look_up(path)
    doc = inspect.cleandoc(vars(cls)["__doc__"])
    # A dataclass without a docstring is given its signature for one.
    assert not doc.startswith(f"{cls.__name__}(")
    assert doc.splitlines()[0].endswith(".")
    is_state = issubclass(cls, (Exception, tuple)) or section(doc, "Attributes")
    assert is_state or section(doc, "Example")


@pytest.mark.parametrize("path", METHODS)
def test_a_method_is_documented(path):
    assert METHODS[path].__doc__.strip()


def documented_constants():
    """Names assigned at the top of a file of jaxmp with a string on the next line."""
    for file in SOURCE.rglob("*.py"):
        body = ast.parse(file.read_text()).body
        for statement, following in itertools.pairwise(body):
            match statement, following:
                case (
                    ast.Assign(targets=[ast.Name(id=name)])
                    | ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str())),
                ):
                    yield name


@pytest.mark.parametrize("path", CONSTANTS)
def test_a_constant_is_documented(path):
    assert path.rsplit(".", 1)[1] in set(documented_constants())


# Types


@pytest.mark.parametrize("path", [*FUNCTIONS, *METHODS])
def test_parameters_and_results_are_annotated(path):
    function = METHODS.get(path) or look_up(path)
    signature = inspect.signature(function)
    assert signature.return_annotation is not signature.empty
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    for parameter in parameters:
        assert parameter.annotation is not parameter.empty, parameter.name


def test_the_package_is_marked_as_typed():
    assert (SOURCE / "py.typed").exists()


# The contract: names, kinds, order and defaults of parameters. More keywords may come.

CONTRACT = """
def Policy(param_dtype, compute_dtype, output_dtype, *, matmul_precision=None): ...
def get_policy(spec): ...
def half_dtype(): ...
def cast_to_full(tree): ...
def cast_to_half(tree): ...
def all_finite(tree): ...
def select_tree(pred, a, b): ...
def NoOpLossScale(): ...
def StaticLossScale(loss_scale): ...
def loss_scaling(inner, policy_or_scale, *, skip_nonfinite=True, **options): ...
def dynamic_loss_scaling(
    inner, *, init_scale=2.0**16, growth_interval=2000, growth_factor=2.0,
    backoff_factor=0.5, min_scale=1.0, max_scale=2.0**24, hysteresis=1, axis_name=None
): ...
def static_loss_scaling(inner, scale): ...
def value_and_grad(
    fun, argnums=0, has_aux=False, *, transform=jax.value_and_grad, **transform_kwargs
): ...
def grad(
    fun, argnums=0, has_aux=False, *, transform=jax.value_and_grad, **kwargs
): ...
def get_loss_scale(opt_state): ...
def scale_loss(loss, opt_state): ...
def loss_scale_metrics(opt_state): ...
def select_applied(opt_state, new, old): ...
def raise_if_collapsed(opt_state, *, max_consecutive_skips): ...
"""
CONTRACT_OF_METHODS = """
def Policy_cast_to_param(self, x): ...
def Policy_cast_to_compute(self, x): ...
def Policy_cast_to_output(self, x): ...
def Policy_with_output_dtype(self, output_dtype): ...
def TrainState_create(*, apply_fn, params, tx, policy): ...
def TrainState_value_and_grad(self, loss_fn): ...
def TrainState_apply_gradients(self, *, grads, value=None, **kwargs): ...
"""


def promised(source):
    namespace = {}
    exec(source, {"jax": jax}, namespace)
    return namespace


def assert_keeps(function, promise):
    actual = dict(inspect.signature(function).parameters)
    expected = inspect.signature(promise).parameters
    for (name, parameter), actual_name in zip(expected.items(), actual, strict=False):
        is_positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        assert not is_positional or name == actual_name
    for name, parameter in expected.items():
        given = actual.pop(name)
        assert given.kind == parameter.kind, name
        assert given.default == parameter.default, name
    for added in actual.values():
        assert added.kind in (added.KEYWORD_ONLY, added.VAR_KEYWORD), added.name
        assert added.kind == added.VAR_KEYWORD or added.default is not added.empty


@pytest.mark.parametrize("name", promised(CONTRACT))
def test_a_signature_keeps_the_contract(name):
    assert name in jaxmp.__all__
    assert_keeps(getattr(jaxmp, name), promised(CONTRACT)[name])


@pytest.mark.parametrize("name", promised(CONTRACT_OF_METHODS))
def test_a_method_keeps_the_contract(name):
    cls, method = name.split("_", 1)
    function = getattr(getattr(jaxmp, cls), method)
    assert_keeps(function, promised(CONTRACT_OF_METHODS)[name])


def test_a_broken_contract_is_noticed():
    def renamed(trees): ...
    def with_a_default(tree=None): ...
    def keyword_only(*, tree): ...
    def one_more(tree, dtype): ...

    promise = promised("def f(tree): ...")["f"]
    for function in (renamed, with_a_default, keyword_only, one_more):
        with pytest.raises((AssertionError, KeyError)):
            assert_keeps(function, promise)


# The index in the docs

ROW = re.compile(r"^\| `([\w.]+)(?:\(.*\))?` \| (.+) \|$", re.MULTILINE)


def test_the_index_lists_every_public_name_once_and_no_other():
    rows = ROW.findall(API_PAGE.read_text())
    listed = [name for name, _ in rows]
    expected = {
        *(*FUNCTIONS, *CLASSES, *CONSTANTS),
        *(module for module in MODULES if module != "jaxmp"),
    }
    assert sorted(expected - set(listed)) == [], "not in docs/api.md"
    assert sorted(set(listed) - {*NAMES, *MODULES}) == [], "not public"
    assert len(set(listed)) == len(listed)


# The project


def test_the_oldest_jax_is_the_one_that_pip_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = ".".join(map(str, jaxmp._jaxpr.versions.OLDEST_JAX[:2]))
    assert f"jax>={oldest}" in project["dependencies"]
