"""What is sent in the wrong dtype: with its line, its repair, and nothing else."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmp import report
from jaxmp.report import StepReport
from jaxmp.report._rows import Row, users_line
from jaxmp.report.hlo._collectives import transfers
from jaxmp.report.hlo._parse import read_hlo
from jaxmp.report.wire_findings import find_on_the_wire

pytestmark = pytest.mark.devices(8, "cpu")

FOLDER = pathlib.Path(__file__).parent / "compiled"
MESH = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))
SHARDED, REPLICATED = NamedSharding(MESH, P("data")), NamedSharding(MESH, P())


def found_in(name, change=lambda text: text):
    program = read_hlo(change((FOLDER / f"{name}.txt").read_text()))
    line = functools.partial(users_line, program)
    return find_on_the_wire(program, transfers(program), line)


def sharded(*shape, sharding=SHARDED):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def over_devices(local):
    specs = (P("data"), P("data"))
    return jax.shard_map(local, mesh=MESH, in_specs=specs, out_specs=P("data"))


def found_here(step, *args):
    row = report.compile_step(
        step, *args, policies=["float32"], targets=["cpu:8"], cache=False
    ).rows[0]
    assert any(one.kind == "all-gather" for one in row.contents.collectives)
    return row.findings


# Sums in half


@pytest.mark.parametrize("name", ["fsdp_h100", "fsdp_v6e"])
def test_gradients_that_are_summed_in_half_are_found(name):
    (one,) = found_in(name)
    assert one.kind == "reduced-in-half"
    assert str(one.source) == "steps.py:16 (fsdp.<locals>.loss)"
    assert "reduce-scatter of bfloat16 over 8 devices (2 a step, 0.44 MiB" in str(one)
    assert "'mixed_bfloat16,reduce=float32'" in one.repair
    assert "transpose(jvp())" in one.path


def test_activations_that_the_next_matmul_reads_are_not_found():
    # The sum over two devices is of activations, the one over four of gradients.
    (one,) = found_in("tensor_parallel_h100")
    assert "all-reduce of bfloat16 over 4 devices (1 a step" in one.message


def test_partial_sums_that_a_tpu_passes_on_are_found():
    (one,) = found_in("pieces_v5e")
    assert "collective-permute of bfloat16 over 8 devices (4 a step" in one.message
    assert one.source is None
    assert "an unknown line" in one.paragraph


def test_permutes_that_are_not_added_are_not_found():
    assert not found_in("pieces_v5e", lambda text: text.replace(" add(", " maximum("))


def test_a_sum_in_float32_and_a_maximum_in_half_are_not_found():
    assert not found_in("fsdp_h100", lambda text: text.replace("bf16[", "f32["))
    assert not found_in("fsdp_h100", lambda text: text.replace("add(", "maximum("))


def test_a_sum_outside_of_a_derivative_has_another_repair():
    def forward(text):
        return text.replace("transpose(jvp())", "jvp()")

    (one,) = found_in("fsdp_h100", forward)
    assert "x.astype(jnp.float32)" in one.repair


# Gathers in float32


def constrained(w, x):
    whole = jax.lax.with_sharding_constraint(w, REPLICATED)
    return x.astype(jnp.bfloat16) @ whole.astype(jnp.bfloat16)


def looked_up(table, x):
    whole = jax.lax.with_sharding_constraint(table, REPLICATED)
    return jnp.take(whole, x.astype(int)[:, 0], axis=0).astype(jnp.float16)


def by_hand(w, x):
    def local(w, x):
        whole = jax.lax.all_gather(w, "data", tiled=True)
        return x.astype(jnp.bfloat16) @ whole.astype(jnp.bfloat16)

    return over_devices(local)(w, x)


def cast_too_late(w, x):
    # What is replicated spreads through the cast: XLA gathers what is in front of it.
    half = jax.lax.with_sharding_constraint(w.astype(jnp.bfloat16), REPLICATED)
    return x.astype(jnp.bfloat16) @ half


def in_a_loop(w, x):
    whole = jax.lax.with_sharding_constraint(w, REPLICATED)

    def body(c, _):
        return (c @ whole.astype(jnp.bfloat16)).astype(jnp.bfloat16), None

    return jax.lax.scan(body, x.astype(jnp.bfloat16), None, 3)[0]


@pytest.mark.parametrize(
    "step", [constrained, looked_up, by_hand, in_a_loop, cast_too_late]
)
def test_a_float32_gather_that_is_only_cast_is_found(step):
    (one,) = found_here(jax.jit(step), sharded(64, 64), sharded(16, 64))
    half = "float16" if step is looked_up else "bfloat16"
    assert one.kind == "gathered-in-float32"
    assert "test_wire_findings.py" in one.source.file
    assert step.__name__ in one.source.function
    assert f"only cast to {half}: twice the bytes" in one.message
    assert f"x.astype(jnp.{half})" in one.repair


def test_a_reshard_of_a_mesh_with_explicit_axes_is_found_too():
    mesh = AbstractMesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    def step(w, x):
        whole = jax.sharding.reshard(w, NamedSharding(mesh, P()))
        return x.astype(jnp.bfloat16) @ whole.astype(jnp.bfloat16)

    explicit = NamedSharding(mesh, P("data"))
    args = sharded(64, 64, sharding=explicit), sharded(16, 64, sharding=explicit)
    (one,) = found_here(jax.jit(step), *args)
    assert one.kind == "gathered-in-float32"


def cast_at_use(w, x):
    return x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)


def cast_while_sharded(w, x):
    half = jax.lax.with_sharding_constraint(w.astype(jnp.bfloat16), SHARDED)
    return x.astype(jnp.bfloat16) @ jax.lax.with_sharding_constraint(half, REPLICATED)


def cast_by_hand(w, x):
    def local(w, x):
        half = jax.lax.all_gather(w.astype(jnp.bfloat16), "data", tiled=True)
        return x.astype(jnp.bfloat16) @ half

    return over_devices(local)(w, x)


def read_twice(w, x):
    whole = jax.lax.with_sharding_constraint(w, REPLICATED)
    return x.astype(jnp.bfloat16) @ whole.astype(jnp.bfloat16), jnp.sin(whole)


def returned(w, x):
    return jax.lax.with_sharding_constraint(w, REPLICATED), x


def in_float32(w, x):
    return x @ jax.lax.with_sharding_constraint(w, REPLICATED)


@pytest.mark.parametrize(
    "step",
    [cast_at_use, cast_while_sharded, cast_by_hand, read_twice, returned, in_float32],
)
def test_a_gather_that_is_needed_as_it_is_is_not_found(step):
    assert found_here(jax.jit(step), sharded(64, 64), sharded(16, 64)) == ()


# How they are shown


def test_findings_are_in_the_text_the_page_and_json(tmp_path):
    row = Row("p", "h100:8", True, 2**30, peak=1, findings=found_in("fsdp_h100"))
    shown = StepReport((row,))
    shown.to_html(tmp_path / "page.html")
    for text in (str(shown), (tmp_path / "page.html").read_text(), shown.to_json()):
        assert "reduced-in-half" in text
        assert "mixed_bfloat16,reduce=float32" in text
    assert shown.to_rows()[0]["findings"][0]["source"]["line"] == 16
