"""Follows one attention block through autocast: the listings of a page of the docs.

    python examples/how_autocast_works.py
    python examples/how_autocast_works.py --write docs/how_autocast_works.md

Each function below returns one listing. They read the plan that autocast makes, so a
changed decision changes the page, and a test compares the two.
"""

import argparse
import textwrap

import jax
import jax.numpy as jnp
from benchmarks.page import write_section

import jaxmp
from jaxmp._jaxpr.atoms import is_literal
from jaxmp.casting.islands._islands import Island
from jaxmp.casting.plan.plan import Context
from jaxmp.casting.planner._whole_function import plan_jaxpr, read_settings

LENGTH, WIDTH = 16, 64
SHORT = {"float32": "f32", "bfloat16": "bf16"}


def attention(weights, inputs):
    stream = inputs @ weights["embed"]
    size = jnp.mean(stream * stream, axis=-1, keepdims=True)
    normed = stream * jax.lax.rsqrt(size + 1e-6) * weights["norm"]
    q, k, v = (normed @ weights[name] for name in ("query", "key", "value"))
    shares = jax.nn.softmax(q @ k.T / 8)
    stream = stream + shares @ v @ weights["out"]
    return stream @ weights["head"]


def arguments():
    square = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    weights = dict.fromkeys(("embed", "query", "key", "value", "out", "head"), square)
    weights["norm"] = jax.ShapeDtypeStruct((1, WIDTH), jnp.float32)
    return weights, jax.ShapeDtypeStruct((LENGTH, WIDTH), jnp.float32)


class Block:
    """The attention block, traced and planned, with a name for each of its values."""

    def __init__(self):
        self.closed = jax.make_jaxpr(attention)(*arguments())
        self.jaxpr = self.closed.jaxpr
        settings = read_settings("mixed_bfloat16", (), True)
        self.plan, planner = plan_jaxpr(self.closed, settings)
        self.wanted = planner.wants(self.jaxpr, (False,), Context()).values
        self.names = names(self.jaxpr)


def names(jaxpr):
    """Arguments are called as in the source, everything else by letters, in order."""
    weights, _ = arguments()
    named = dict(zip(jaxpr.invars, [*sorted(weights), "inputs"], strict=True))
    results = [v for eqn in jaxpr.eqns for v in eqn.outvars]
    return {**named, **{v: letters(i) for i, v in enumerate(results)}}


def letters(i):
    letter = "abcdefghijklmnopqrstuvwxyz"[i % 26]
    return letter if i < 26 else letters(i // 26 - 1) + letter


def name(atom, named):
    return f"{float(atom.val):g}" if is_literal(atom) else named[atom]


def equation(eqn, named):
    """An equation without its parameters, such as `c = add a b`."""
    operands = " ".join(name(v, named) for v in eqn.invars)
    results = " ".join(named[v] for v in eqn.outvars)
    return f"{results} = {eqn.primitive.name} {operands}"


def shape(aval):
    return f"{SHORT[aval.dtype.name]}[{','.join(map(str, aval.shape))}]"


def columns(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


# The listings


def decisions(block):
    """Both passes: what is wanted low, and what each equation gets, and why."""
    found = dict(zip(block.jaxpr.invars, block.plan.in_states, strict=True))
    rows = [("equation", "wanted", "reads", "class", "in", "gives", "reason")]
    for plan in block.plan.eqns:
        eqn = plan.eqn
        reads = [found[v].kind.value for v in eqn.invars if not is_literal(v)]
        found.update(zip(eqn.outvars, plan.out_states, strict=True))
        rows.append(
            (
                equation(eqn, block.names),
                "low" if eqn.outvars[0] in block.wanted else "",
                ", ".join(dict.fromkeys(reads)),
                plan.op_class.value,
                SHORT[str(plan.in_dtypes[0])],
                plan.out_states[0].kind.value,
                textwrap.shorten(plan.reason, 49, placeholder=" ..."),
            )
        )
    return columns(rows)


def islands(block):
    """What runs together in float32."""
    named = block.names
    rows = [("takes", "runs", "returns", "backward pass")]
    for island in filter(lambda step: isinstance(step, Island), block.plan.steps):
        takes = [named[v] for v in island.inputs]
        runs = [named[plan.eqn.outvars[0]] for plan in island.members]
        returns = [
            f"{named[v]} in {SHORT[str(dtype or 'float32')]}"
            for v, dtype in island.outputs
        ]
        row = ", ".join(takes), " ".join(runs), ", ".join(returns), kept(island)
        rows.append(row)
    return columns(rows)


def kept(island):
    if island.softmax is not None:
        return "keeps the half result alone"
    return "repeats it from its inputs" if island.recompute else "needs none of it"


def program(_):
    """What autocast hands back to JAX: the jaxpr of the new function."""
    jaxpr = jax.make_jaxpr(jaxmp.autocast(attention))(*arguments()).jaxpr
    named = names(jaxpr)
    lines = []
    for eqn in jaxpr.eqns:
        text = equation(eqn, named).replace("convert_element_type", "cast")
        result, operation = text.split(" = ")
        lines.append(f"{result}: {shape(eqn.outvars[0].aval)} = {operation}")
    return "\n".join(lines)


LISTINGS = (decisions, islands, program)


def listings():
    """Every listing as a block of Markdown, by name."""
    block = Block()
    return {make.__name__: f"```text\n{make(block)}\n```" for make in LISTINGS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", metavar="PAGE", help="put the listings there")
    path = parser.parse_args().write
    for title, text in listings().items():
        if path is None:
            print(f"{title}\n\n{text}\n")
        else:
            write_section(path, title, text)


if __name__ == "__main__":
    main()
