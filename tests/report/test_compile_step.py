"""`compile_step` on the machine's own compiler: what is read, shown and refused."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxmp import errors, report
from jaxmp.report import _max_batch_size, compile_step, compile_step_of, max_batch_size
from jaxmp.report._rows import Row

from .programs import CASES, MLP_PARAMS, array, mlp_step

compile_here = functools.partial(
    compile_step, policies=["float32"], targets=["cpu"], cache=False
)


@pytest.fixture(scope="module")
def told():
    return compile_step(
        mlp_step, MLP_PARAMS, array(16, 64), targets=["cpu"], donate_argnums=(0,)
    )


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("JAXMP_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


# What is counted


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matmul_flops_are_those_of_a_hand_count(case):
    row = compile_here(case.step, *case.args).rows[0]
    matmuls = row.contents.matmuls
    assert sum(total.amount for total in matmuls.values()) == case.flops


def test_sizes_are_those_of_a_hand_count(told):
    row = told.row("float32", "cpu")
    params = 4 * (64 * 128 + 128 * 32)
    assert row.arguments == params + 4 * 16 * 64
    # The parameters are donated, so the results need no memory of their own.
    assert row.output >= params
    assert row.peak < row.arguments + row.output + row.temp


def test_without_donation_the_results_need_memory():
    row = compile_here(mlp_step, MLP_PARAMS, array(16, 64)).rows[0]
    assert row.peak == row.arguments + row.output + row.temp


def test_a_jitted_step_donates_what_it_donates():
    jitted = jax.jit(mlp_step, donate_argnums=(0,))
    kept = compile_here(mlp_step, MLP_PARAMS, array(16, 64)).rows[0]
    reused = compile_here(jitted, MLP_PARAMS, array(16, 64)).rows[0]
    assert reused.peak < kept.peak


def test_buffers_at_the_peak_name_arguments_and_lines(told):
    buffers = told.row("float32", "cpu").buffers
    names = [buffer.name for buffer in buffers]
    assert "params/a" in names
    assert buffers[0].bytes >= buffers[-1].bytes
    made = [buffer for buffer in buffers if buffer.source]
    assert made
    assert all("programs.py" in buffer.source for buffer in made)
    hidden = next(b for b in buffers if b.array == "f32[16,128]" and b.source)
    assert "(mlp_step.<locals>.loss)" in hidden.source


def test_what_the_buffers_add_up_to_is_what_the_compiler_told():
    def deep(ws, x):
        def loss(ws):
            h = x
            for w in ws:
                h = jnp.tanh(h @ w)
            return jnp.sum(h**2)

        return jax.grad(loss)(ws)

    row = compile_here(deep, [array(256, 256)] * 6, array(1024, 256)).rows[0]
    listed = sum(buffer.bytes for buffer in row.buffers)
    assert 0.8 * row.peak < listed <= 1.05 * row.peak


def test_a_policy_changes_the_dtype_of_what_is_kept():
    def dtypes_of(policy):
        row = compile_step(
            mlp_step, MLP_PARAMS, array(16, 64), policies=[policy], targets=["cpu"]
        ).rows[0]
        return set(row.contents.converts)

    assert not dtypes_of("float32")
    assert "float32 -> bfloat16" in dtypes_of("mixed_bfloat16")
    assert "float32 -> float16" in dtypes_of("mixed_float16")


def test_a_step_with_an_argument_named_policy_is_given_it():
    def step(x, policy):
        return x.astype(jnp.bfloat16) if policy == "bfloat16" else x

    rows = compile_step(
        step, array(8, 8), policies=["float32", "bfloat16"], targets=["cpu"]
    ).rows
    assert [row.output for row in rows] == [256, 128]


def test_arguments_may_depend_on_the_policy():
    def step_of_policy(policy):
        return jnp.tanh, array(8, 8, dtype="float16" if "16" in policy else "float32")

    rows = compile_step_of(
        step_of_policy, policies=["float32", "float16"], targets=["cpu"]
    ).rows
    assert [row.arguments for row in rows] == [256, 128]


def test_trees_of_any_class_keys_and_unused_arguments_compile():
    class State(tuple):
        __slots__ = ()

    jax.tree_util.register_pytree_node(
        State, lambda s: (s, None), lambda _, x: State(x)
    )

    def step(state, key, unused):
        return State((state[0] + jax.random.normal(key, (4,)),)), {"none": None}

    key = jax.eval_shape(lambda: jax.random.key(0))
    row = compile_here(step, State((array(4),)), key, array(1000)).rows[0]
    assert row.arguments == 4 * 4 + 2 * 4  # jit leaves out what is not used


# How it is shown


def test_every_form_holds_every_row(told, tmp_path):
    rows = told.to_rows()
    assert [row["policy"] for row in rows] == [row.policy for row in told.rows]
    assert json.loads(told.to_json()) == json.loads(json.dumps(rows))
    told.to_html(tmp_path / "page.html")
    told.to_png(tmp_path / "chart.png")
    page = (tmp_path / "page.html").read_text()
    for policy in ("float32", "mixed_bfloat16", "mixed_float16"):
        assert policy in page
        assert policy in str(told)
    assert "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_lines_of_code_below_the_working_directory_are_shown_from_there(
    told, monkeypatch, tmp_path
):
    folder = pathlib.Path(__file__).parent
    monkeypatch.chdir(tmp_path)
    assert f" {folder}/programs.py:" in str(told)
    monkeypatch.chdir(folder.parent)
    assert f" {folder.name}/programs.py:" in str(told)


def test_the_text_says_what_is_an_estimate(told):
    assert "An estimate, not a measurement" in str(told)


def test_a_row_that_is_not_there_is_told_what_is(told):
    with pytest.raises(
        KeyError, match=r"no row for bfloat16 on h100\. Its rows: float32 on cpu"
    ):
        told.row("bfloat16", "h100")


# The cache


def test_an_answer_is_read_again_and_a_change_is_compiled(monkeypatch):
    from jaxmp.report.compile import _compiler

    asked = []
    compile_request = _compiler.compile_request
    monkeypatch.setattr(
        _compiler, "compile_request", lambda r: asked.append(r) or compile_request(r)
    )

    def run(step, *args):
        return compile_step(step, *args, policies=["float32"], targets=["cpu"])

    def double(x):
        return 2 * x

    first, again = run(double, array(4)), run(double, array(4))
    assert len(asked) == 1
    assert first == again
    run(double, array(5))
    run(lambda x: 3 * x, array(4))
    assert len(asked) == 3
    compile_here(double, array(4))
    assert len(asked) == 4


def test_a_broken_entry_of_the_cache_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXMP_CACHE_DIR", str(tmp_path))

    def run():
        return compile_step(
            jnp.tanh, array(4), policies=["float32"], targets=["cpu"]
        ).rows[0]

    first = run()
    (entry,) = tmp_path.rglob("*.gz")
    entry.write_bytes(b"no gzip")
    assert run().arguments == first.arguments


# Bad input


def test_a_target_that_does_not_exist_is_told_the_nearest():
    with pytest.raises(errors.UnknownTarget, match="Did you mean 'tpu-v5e'"):
        compile_here(jnp.tanh, array(4), targets=["tpu_v5e"])


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("tpu-v5e:7", "has 1, 4, 8, 16, 32, 64, 128, 256 devices"),
        ("h100:0", "1 to 8, or a multiple of 8"),
        ("h100:", "1 to 8"),
        ("h100:x", "1 to 8"),
        ("cpu:999", f"1 to {len(jax.devices('cpu'))} devices"),
    ],
)
def test_a_number_of_devices_that_no_slice_has_is_refused(target, words):
    with pytest.raises(errors.UnknownTarget, match=words):
        compile_here(jnp.tanh, array(4), targets=[target])


def test_an_argument_that_is_no_array_is_named():
    with pytest.raises(errors.NotAnArray, match=r"Argument 1/name .* is 'relu'"):
        compile_here(lambda x, c: x, array(4), {"name": "relu"})


def test_a_step_that_does_not_trace_says_why_and_with_what():
    with pytest.raises(errors.StepDoesNotTrace) as caught:
        compile_here(jnp.matmul, array(4, 5), array(4, 5))
    assert "2 arrays (float32[4, 5], float32[4, 5])" in str(caught.value)
    assert "TypeError" in str(caught.value)


@pytest.mark.devices(4, "cpu")
def test_a_program_for_other_devices_than_the_target_has_is_refused():
    with pytest.raises(errors.ShardingMismatch, match="AbstractMesh"):
        compile_here(jnp.tanh, array(8), targets=["cpu:4"])


def test_a_policy_that_cannot_be_read_is_refused():
    with pytest.raises(errors.PolicyError):
        compile_here(jnp.tanh, array(4), policies=["half-ish"])


def test_a_batch_search_needs_batches_and_a_memory():
    def step_of_batch(batch):
        return jnp.tanh, array(batch, 4)

    with pytest.raises(errors.BatchSearchError, match="multiple_of=64"):
        max_batch_size(step_of_batch, target="h100", multiple_of=64, limit=32)
    with pytest.raises(errors.BatchSearchError, match="memory of 'cpu' is unknown"):
        max_batch_size(step_of_batch, target="cpu")


@pytest.mark.parametrize("tolerance", [0, 0.01, 0.3])
def test_a_batch_search_ends_within_its_tolerance(tolerance, monkeypatch):
    def compile_step_of(step_of_policy, *, targets, **options):
        batch = step_of_policy(None)
        # A line that bends, so that the search has to close the gap step by step.
        peak = int(1e6 * batch + 300 * batch**1.5)
        return report.StepReport(
            (Row("as it is", *targets, peak <= 2**30, 2**30, peak=peak),)
        )

    monkeypatch.setattr(_max_batch_size, "compile_step_of", compile_step_of)
    found = max_batch_size(lambda n: n, target="h100", tolerance=tolerance)
    (refused,) = sorted(n for n, fits in found.tried.items() if not fits)[:1]
    assert found.tried[found.batch]
    assert refused - found.batch <= max(1, tolerance * found.batch)
    assert found.memory == 2**30


def test_a_missing_compiler_names_the_command_that_mends_it(monkeypatch):
    from jaxmp.report.compile import targets as _targets

    monkeypatch.setattr(_targets, "_is_installed", lambda name: False)
    with pytest.raises(errors.MissingTargetPackage, match=r"jaxmp\[targets\]"):
        compile_here(jnp.tanh, array(4), targets=["h100"])


def test_targets_name_this_machine_and_the_compilers():
    names = report.targets()
    assert names[0] == "cpu"
    assert {jax.default_backend(), "h100"} <= set(names)
    assert report.has_target("cpu")


def test_options_of_the_compiler_reach_it():
    ask = functools.partial(compile_here, jnp.tanh, array(8, 8))
    assert ask(compiler_options={"xla_cpu_enable_fast_math": True}).rows[0].peak
    with pytest.raises(errors.CompilerFailed, match="xla_no_such_option"):
        ask(compiler_options={"xla_no_such_option": True})
