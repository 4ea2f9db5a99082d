"""Functions that users register, or wrap, to be traced on half operands."""

import importlib
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import flash_attention as flash
from jax.experimental.pallas.ops.tpu import splash_attention as splash

import jaxmp
from jaxmp.casting.ops import _half_functions
from jaxmp.errors import AutocastRuleError, RuleAlreadyRegistered

BF16, F16, F32 = (jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))
X = jax.random.normal(jax.random.key(0), (2, 8, 16))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(_half_functions, "_registered", {})


def attend(q, k, v, *, scale=1.0, seen=None):
    seen.append(q.dtype)
    return jnp.matmul(q * scale, k.T).astype(q.dtype) @ v


@jax.jit
def jitted_attend(q, k, v):
    return attend(q, k, v, seen=SEEN)


class Kernel:
    def __call__(self, q, k, v):
        return attend(q, k, v, seen=SEEN)

    @staticmethod
    def attend(q, k, v):
        return attend(q, k, v, seen=SEEN)


class Inherited(Kernel):
    pass


SEEN = []
HERE = sys.modules[__name__]


def dtypes_seen(fn, *args):
    SEEN.clear()
    fn(*args)
    return list(SEEN)


def calls_attend(x):
    return attend(x, x, x, seen=SEEN)


CALLS = {
    "a function": (attend, calls_attend),
    "a jitted function": (jitted_attend, lambda x: jitted_attend(x, x, x)),
    "a method": (Kernel.__call__, lambda x: Kernel()(x, x, x)),
    "a method by its name": (
        f"{__name__}.Kernel.__call__",
        lambda x: Kernel()(x, x, x),
    ),
    "an inherited method": (Inherited.__call__, lambda x: Inherited()(x, x, x)),
    "a static method": (Kernel.attend, lambda x: Kernel.attend(x, x, x)),
    "a name": (f"{__name__}.attend", calls_attend),
}


@pytest.mark.parametrize(("function", "call"), CALLS.values(), ids=CALLS)
def test_functions_that_a_user_registers(function, call):
    x = X[0, :4, :4]
    cast = jaxmp.autocast(call)
    before = vars(HERE).copy(), vars(Kernel).copy()
    jax.clear_caches()
    assert dtypes_seen(cast, x) == [F32]
    jaxmp.register_rule(function, "half_operands")
    assert dtypes_seen(cast, x) == [BF16]
    assert cast(x).dtype == F32
    assert dtypes_seen(call, x + 1) == [F32]
    assert all(vars(HERE)[name] is value for name, value in before[0].items())
    assert all(vars(Kernel)[name] is value for name, value in before[1].items())


def test_registering_twice_is_an_error():
    for function in (attend, Kernel.__call__, "library.attend", lambda q: q):
        jaxmp.register_rule(function, "half_operands")
        with pytest.raises(RuleAlreadyRegistered, match="half operands already"):
            jaxmp.register_rule(function, "half_operands")
    with pytest.raises(RuleAlreadyRegistered):
        jaxmp.register_rule(f"{__name__}.attend", "half_operands")
    kernel = importlib.import_module(f"{splash.__name__}.splash_attention_kernel")
    for known in (flash.flash_attention, kernel.SplashAttentionKernel.__call__):
        with pytest.raises(RuleAlreadyRegistered):
            jaxmp.register_rule(known, "half_operands")


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (3, {}, "3 is not a function"),
        ("attend", {}, "not a dotted name"),
        (Kernel().__call__, {}, r"register_rule\(Kernel.__call__, 'half_operands'\)"),
        (attend, {"params_at": dict}, "for primitives"),
        (attend, {"reason": "mine"}, "for primitives"),
    ],
)
def test_what_cannot_be_registered(function, options, message):
    with pytest.raises(AutocastRuleError, match=message):
        jaxmp.register_rule(function, "half_operands", **options)


def write_modules(tmp_path, monkeypatch):
    (tmp_path / "a_library.py").write_text(
        "def fused(q, seen):\n    seen.append(q.dtype)\n    return q\n"
    )
    (tmp_path / "a_model.py").write_text(
        "from a_library import fused as kernel\nimport functools\n"
        "held = functools.partial(kernel)\n"
        "def model(x, seen):\n    return kernel(x, seen)\n"
        "def late(x, seen):\n    from a_library import fused\n"
        "    return fused(x, seen)\n"
        "def through_a_partial(x, seen):\n    return held(x, seen)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("a_library", "a_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("a_model")


def seen_by(fn, x=X):
    seen = []
    jaxmp.autocast(lambda x: fn(x, seen))(x)
    return seen


def test_a_name_that_another_module_imported(tmp_path, monkeypatch):
    jaxmp.register_rule("a_library.fused", "half_operands")
    assert seen_by(lambda x, seen: x) == []
    model = write_modules(tmp_path, monkeypatch)
    kernel = model.kernel
    assert seen_by(model.model) == [BF16]
    assert seen_by(model.late) == [BF16]
    assert model.kernel is kernel is sys.modules["a_library"].fused
    # What a partial holds is no name.
    assert seen_by(model.through_a_partial) == [F32]
    model.held = jaxmp.half_operands(model.held)
    assert seen_by(model.through_a_partial) == [BF16]


def test_a_module_that_is_imported_meanwhile(tmp_path, monkeypatch):
    jaxmp.register_rule("a_library.fused", "half_operands")
    model = write_modules(tmp_path, monkeypatch)
    monkeypatch.delitem(sys.modules, "a_model")

    def imports(x, seen):
        return importlib.import_module("a_model").model(x, seen)

    for _ in range(2):
        assert seen_by(imports) == [BF16]
        seen = []
        sys.modules["a_model"].model(X, seen)
        assert seen == [F32]
    assert model.kernel is sys.modules["a_library"].fused


def test_names_lead_back_after_an_error():
    original = flash.flash_attention

    def fails(x):
        assert flash.flash_attention is not original
        raise KeyError

    with pytest.raises(KeyError):
        jaxmp.autocast(fails)(X)
    assert flash.flash_attention is original


def test_names_that_were_given_a_value_meanwhile_keep_it(monkeypatch):
    jaxmp.register_rule(attend, "half_operands")
    monkeypatch.setattr(HERE, "attend", attend)

    def replaces(x):
        HERE.attend = len
        return x

    jaxmp.autocast(replaces)(X)
    assert attend is len


def test_other_threads_call_the_function_as_it_is():
    jaxmp.register_rule(attend, "half_operands")
    original, x = attend, X[0, :4, :4]
    inside, done, seen = threading.Event(), threading.Event(), []

    def other():
        inside.wait(60)
        assert attend is not original
        attend(x, x, x, seen=seen)
        jax.jit(lambda x: attend(x, x, x, seen=seen))(x)
        # A trace that ends while another goes on leaves the names to it.
        jaxmp.autocast(calls_attend)(x)
        done.set()

    def slow(x):
        y = calls_attend(x)
        inside.set()
        assert done.wait(60)
        return y + calls_attend(x)

    thread = threading.Thread(target=other)
    thread.start()
    assert dtypes_seen(jaxmp.autocast(slow), x) == [BF16] * 3
    thread.join()
    assert seen == [F32, F32]
    assert attend is original


def test_the_explicit_wrapper():
    fused = jaxmp.half_operands(attend)
    x = X[0, :4, :4]
    taken = []

    def call(x):
        tree = {"k": [x, (x, 3)], "i": jnp.arange(3), "s": jnp.float32(0.1)}
        pair = jaxmp.half_operands(lambda t: (taken.append(t), t["k"][0])[1])
        return pair(tree) + fused(x, k=x, v=np.ones((4, 4)), seen=SEEN)

    assert dtypes_seen(jaxmp.autocast(call, "mixed_float16"), x) == [F16]
    dtypes = [getattr(x, "dtype", type(x)) for x in jax.tree.leaves(taken[0])]
    assert dtypes == [jnp.int32, F16, F16, int, F32]
    assert dtypes_seen(call, x) == [F32]
    assert fused.__name__ == "attend"
    assert dtypes_seen(jaxmp.autocast(jaxmp.full_precision(call)), x) == [F32]
