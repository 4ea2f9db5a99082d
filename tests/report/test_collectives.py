"""What devices send each other: counted in texts of every compiler, and on this one."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmp import report
from jaxmp.report import StepReport
from jaxmp.report._rows import Row
from jaxmp.report.hlo._collectives import total, transfers, wire_bytes
from jaxmp.report.hlo._contents import Contents
from jaxmp.report.hlo._groups import group_size
from jaxmp.report.hlo._parse import read_hlo
from jaxmp.report.hlo._program import Instruction

FOLDER = pathlib.Path(__file__).parent / "compiled"


def read(name):
    return read_hlo((FOLDER / f"{name}.txt").read_text())


def counted(program):
    """`(kind, dtype, group, times, bytes, wire)` of everything that is sent."""
    return [one[:-1] for one in total(transfers(program), lambda *place: "")]


def sharded(mesh, *shape, spec, dtype=jnp.float32):
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def sent_here(step, *args):
    return report.compile_step(
        step, *args, policies=["float32"], targets=["cpu:8"], cache=False
    ).rows[0]


# What other compilers wrote

WEIGHT = 512 * 256 * 2


def test_an_h100_sends_whole_arrays_of_operations_that_take_several():
    # Two weights of 512 x 256 in bfloat16, sharded over eight devices.
    wire = 2 * WEIGHT * 7 / 8
    assert counted(read("fsdp_h100")) == [
        ("all-gather", "bfloat16", 8, 2, 2 * WEIGHT, wire),
        ("reduce-scatter", "bfloat16", 8, 2, 2 * WEIGHT, wire),
    ]


def test_a_tpu_writes_a_reduce_scatter_as_a_sum_of_which_slices_are_kept():
    wire = 2 * WEIGHT * 7 / 8
    assert counted(read("fsdp_v6e")) == [
        ("all-gather", "bfloat16", 8, 2, 2 * WEIGHT, wire),
        ("reduce-scatter", "bfloat16", 8, 2, 2 * WEIGHT, wire),
    ]


def test_two_axes_of_a_mesh_are_two_groups():
    # Gradients of both halves over four devices; activations, 256 x 512, over two.
    assert counted(read("tensor_parallel_h100")) == [
        ("all-reduce", "bfloat16", 4, 1, WEIGHT, 2 * WEIGHT * 3 / 4),
        ("all-reduce", "bfloat16", 2, 1, 256 * 512 * 2, 2 * 256 * 512 * 2 / 2),
    ]


def test_an_asynchronous_operation_of_a_tpu_is_counted_once():
    gather = next(one for one in counted(read("pieces_v5e")) if "gather" in one[0])
    assert gather == ("all-gather", "bfloat16", 8, 1, 2**17, 2**17 * 7 / 8)


def test_an_asynchronous_operation_whose_start_is_unknown_is_counted_once():
    text = (FOLDER / "pieces_v5e.txt").read_text()
    program = read_hlo(text.replace('"AsyncCollectiveStart"', '"Begin"'))
    assert [one[3] for one in counted(program) if one[0] == "all-gather"] == [1]


def test_a_loop_that_is_unrolled_once_runs_half_as_often():
    # From 0 to 4 in steps of 2, with two permutes of 32 x 256 in each.
    permute = next(one for one in counted(read("pieces_v5e")) if "permute" in one[0])
    size = 32 * 256 * 2
    assert permute == ("collective-permute", "bfloat16", 8, 4, 4 * size, 4.0 * size)


# Groups


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3}}", 2),
        ("{{0,1,2},{3}}", 3),
        ("{{0}}", 1),
        ("{}", 8),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=8] {'axis_0'}", 8),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4], axes {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c'}", 2),
        ("mesh['a'=8], device_ids=(3,1,0,2,7,6,5,4) {'a':(2)4}", 4),
        ("@mesh<u=10,v=12,w=15> {u,v}", 120),
        ("@mesh<a=2,b=4,c=4,d=2>, device_ids=([4,16]T(1,0)) {a,b:(1)2,d}", 8),
    ],
)
@pytest.mark.parametrize("rest", [", dimensions={0}", ""], ids=["dimensions", "last"])
def test_groups_are_read_in_every_form(groups, size, rest):
    attributes = (
        f", channel_id=1, use_global_device_ids=true, replica_groups={groups}{rest}"
    )
    instruction = Instruction("x", "all-gather", (), "", attributes)
    program = read("fsdp_h100")
    assert group_size(instruction, "all-gather", program) == size


def test_groups_in_a_form_of_the_future_are_all_devices_and_a_warning():
    attributes = ", channel_id=1, use_global_device_ids=true, replica_groups=<8>"
    instruction = Instruction("x", "all-gather", (), "", attributes)
    with pytest.warns(UserWarning, match="cannot read: '<8>'"):
        assert group_size(instruction, "all-gather", read("fsdp_h100")) == 8


@pytest.mark.parametrize(
    ("kind", "attributes", "size"),
    [
        # Copies of the program, each on two devices.
        ("all-reduce", ", replica_groups={}", 4),
        ("all-reduce", ", replica_groups={{0,1},{2,3}}", 2),
        ("all-reduce", ", channel_id=1, replica_groups={{0,1},{2,3}}", 4),
        ("all-to-all", ", channel_id=1, replica_groups={{0,1}}", 2),
        ("all-to-all", ", channel_id=1, replica_groups={}", 2),
        ("collective-permute", ", source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", 2),
        ("collective-permute", ", source_target_pairs={{0,1},{1,2},{2,3}}", 4),
        ("collective-permute", ", source_target_pairs={{0,0},{1,1}}", 1),
        ("collective-permute", ", source_target_pairs={}", 1),
    ],
)
def test_groups_of_copies_partitions_and_rings(kind, attributes, size):
    program = read("fsdp_h100")._replace(replicas=4, partitions=2)
    instruction = Instruction("x", kind, (), "", attributes)
    assert group_size(instruction, kind, program) == size


def test_bytes_on_the_wire_are_those_of_rings():
    kinds = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce")
    assert [wire_bytes(kind, 800, 8) for kind in kinds] == [700, 700, 700, 1400]
    assert wire_bytes("collective-permute", 800, 8) == 800
    assert wire_bytes("collective-broadcast", 800, 8) == 800
    assert {wire_bytes(kind, 800, 1) for kind in (*kinds, "collective-permute")} == {0}


# What this machine's compiler writes

MESH = AbstractMesh((2, 4), ("a", "b"))


def everything(x):
    y = jax.lax.all_gather(x, "b", tiled=True)
    z = jax.lax.psum_scatter(y, "a", tiled=True)
    w = jax.lax.all_to_all(z, "b", 0, 1, tiled=True)
    v = jax.lax.ppermute(w, "b", [(i, (i + 1) % 4) for i in range(4)])
    return jax.lax.psum(v.sum(), ("a", "b"))


@pytest.mark.devices(8, "cpu")
def test_collectives_by_hand_are_counted_in_their_groups():
    step = jax.jit(
        jax.shard_map(
            everything, mesh=MESH, in_specs=P("b"), out_specs=P(), check_vma=False
        )
    )
    row = sent_here(step, sharded(MESH, 512, 64, spec=P("b")))
    size = 512 * 64 * 4
    found = {one.kind: one for one in row.contents.collectives}
    assert found["all-gather"][1:6] == ("float32", 4, 1, size, size * 3 / 4)
    half = size // 2
    if "reduce-scatter" in found:
        assert found["reduce-scatter"][1:6] == ("float32", 2, 1, size, half)
    assert found["all-to-all"][2:6] == (4, 1, half, half * 3 / 4)
    assert found["collective-permute"][2:6] == (4, 1, half, half)
    sums = [one for one in row.contents.collectives if one.kind == "all-reduce"]
    assert (sums[-1].group, sums[-1].bytes, sums[-1].wire) == (8, 4, 7.0)
    assert all("test_collectives.py" in one.source for one in found.values())


@pytest.mark.devices(8, "cpu")
def test_a_loop_sends_as_often_as_it_runs():
    mesh = AbstractMesh((8,), ("data",))

    def step(x):
        body = lambda c, _: (jax.lax.psum(c, "data") / 8, None)  # noqa: E731
        return jax.lax.scan(body, x, None, 5)[0]

    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    row = sent_here(jax.jit(mapped), sharded(mesh, 64, 16, spec=P("data")))
    (one,) = row.contents.collectives
    size = 8 * 16 * 4
    assert one[:6] == ("all-reduce", "float32", 8, 5, 5 * size, 5 * 2 * size * 7 / 8)


@pytest.mark.devices(8)
def test_copies_of_a_program_send_too():
    mapped = jax.pmap(lambda x: jax.lax.pmean(x, "i"), axis_name="i")
    compiled = mapped.lower(jnp.zeros((8, 100))).compile()
    (one,) = counted(read_hlo(compiled.as_text()))
    assert one == ("all-reduce", "float32", 8, 1, 400, 700.0)


def test_one_device_sends_nothing():
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    step = jax.shard_map(
        lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    compiled = jax.jit(step).lower(jnp.zeros(8)).compile()
    assert sum(one[-1] for one in counted(read_hlo(compiled.as_text()))) == 0


# How it is shown


@functools.cache
def shown():
    sent = total(transfers(read("tensor_parallel_h100")), lambda *place: "a.py:3 (f)")
    contents = Contents({}, {}, sent)
    return StepReport((Row("p", "h100:8", True, 2**30, peak=1, contents=contents),))


def test_the_text_has_a_table_with_a_total():
    lines = [line.split() for line in str(shown()).splitlines()]
    first = ["all-reduce", "bfloat16", "4", "1", "0.25", "0.38", "a.py:3", "(f)"]
    assert first in lines
    assert ["total", "2", "0.50", "0.62"] in lines


def test_pages_and_json_have_what_is_sent(tmp_path):
    shown().to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "MiB on the wire" in page
    assert "<td" in page
    assert '"wire": 393216.0' in shown().to_json()
