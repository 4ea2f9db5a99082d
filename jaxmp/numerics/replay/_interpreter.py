"""Runs a program one operation at a time, and lets others look at every result.

    class Names(Interpreter):
        def observe(self, site, operands, results):
            print(self.iterations, site.path, site.primitive, site.line, results)

    program = read_program(fn, args, kwargs, policy="mixed_float16", loss_scale=1024)
    outputs = Names().run_program(program)

`observe` is called for each operation that was carried out, in order, with the arrays
that it took and gave; calls (`jit`, `checkpoint`, custom rules) and loops are entered
and never seen themselves. A subclass that overrides `equation` may round, replace or
wrap the results: what it returns is what the rest of the program gets.

`site` is one object per place in the program: a dictionary keyed by it sums over the
iterations of a loop, whose numbers, outermost loop first, are in `self.iterations`.
`site.path` and `site.line` say where it stands, `site.is_backward` whether it is part
of a backward pass or needed by gradients alone. `program.outputs` names the outputs:
loss, other outputs, gradients; `program.at_scale(scale)` is the same program under
another loss scale.

Operations are bound eagerly: JAX compiles each once per shape, every result is rounded
to its dtype, and no rewriting by XLA hides a value. The cost is linear in the number
of operations that are carried out.

A subclass that wraps values overrides `constant`, `take` and `stack` as well,
`concrete` to unwrap the numbers that decide on branches, and `shards`.

Sharp edges
- Effects (`debug.print`, callbacks) happen as often as the program is run, and with
  `value_only` only where a result is needed.
- Inside of `shard_map`, floating values have a first axis for the devices, loops and
  branches are one operation each, and `equation` is not asked.
- Primitives that hold jaxprs and are not listed in `_ENTER`, such as `pallas_call` and
  `custom_linear_solve`, are one operation.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.versions import open_jaxpr, scan_arity
from jaxmp.numerics.replay._program import Program
from jaxmp.numerics.replay._shards import Record, run_shards
from jaxmp.numerics.replay._site import Site
from jaxmp.numerics.replay._steps import Steps


class Interpreter:
    """Runs jaxprs; see the module's docstring.

    Attributes:
      iterations: numbers of the iterations of the loops around, outermost first.
    """

    def __init__(self):
        self.iterations: tuple[int, ...] = ()
        self._sites: dict[tuple[Any, int], Site] = {}
        self._steps: dict[tuple[int, tuple[bool, ...]], Steps] = {}
        self._literals: dict[int, Any] = {}

    # What subclasses override

    def equation(self, site: Site, operands: Sequence[Any]) -> list[Any]:
        """Carries out one operation."""
        results = bind(site.eqn, operands)
        self.observe(site, operands, results)
        return results

    def observe(
        self, site: Site, operands: Sequence[Any], results: Sequence[Any]
    ) -> None:
        """Looks at an operation that was carried out."""

    def constant(self, value: jax.Array, site: Site | None) -> Any:
        """A literal of the equation at `site`, or a constant of the program."""
        del site
        return value

    def take(self, values: Sequence[Any], index: int) -> list[Any]:
        """The slices with which a scan enters an iteration."""
        return take(list(values), np.int32(index))

    def stack(self, site: Site, rows: Sequence[Sequence[Any]]) -> list[Any]:
        """Joins what the iterations of a scan gave, in the order of their slices."""
        del site
        return [stack(column) for column in zip(*rows, strict=True)]

    def concrete(self, value: Any) -> Any:
        """The array that a value stands for."""
        return value

    def loop(self, site: Site, operands: Sequence[Any]) -> list[Any]:
        """Runs a scan or a while loop, iteration by iteration."""
        run = self._scan if site.primitive == "scan" else self._while
        return run(site, operands)

    def call(self, site: Site, jaxpr: Any, operands: Sequence[Any]) -> list[Any]:
        """Runs the body of a call, of a branch, or of one iteration."""
        needed = site.needed
        if site.primitive in ("scan", "while"):
            num_carry = len(site.eqn.outvars)
            if site.primitive == "scan":
                num_carry = scan_arity(site.eqn.params)[1]
            count = len(open_jaxpr(jaxpr).outvars)
            needed = ((True,) * num_carry + needed[num_carry:])[:count]
        return self.run(jaxpr, operands, site, needed)

    def shards(self, site: Site, operands: Sequence[Any]) -> list[Any]:
        """Runs a `shard_map` and looks at every operation inside."""
        outs, records = self.look_into_shards(site, operands)
        for record in records:
            self.observe(*record)
        return outs

    # How programs are run

    def run_program(
        self,
        program: Program,
        inputs: Sequence[Any] | None = None,
        *,
        value_only: bool = False,
    ) -> list[Any]:
        """Runs a program and returns its outputs.

        Args:
          program: the program.
          inputs: values to run it on, other than its own.
          value_only: carry out no more than the function's value needs, and return its
            outputs without the gradients.
        """
        inputs = program.inputs if inputs is None else inputs
        is_value = [output.kind != "gradient" for output in program.outputs]
        with jax.debug_nans(False), jax.debug_infs(False):
            outs = self.run(
                program.jaxpr, inputs, None, tuple(is_value), value_only=value_only
            )
        return list(itertools.compress(outs, is_value)) if value_only else outs

    def run(
        self,
        jaxpr: Any,
        args: Sequence[Any],
        parent: Site | None,
        needed: tuple[bool, ...],
        value_only: bool = False,
    ) -> list[Any]:
        """Runs a jaxpr; a value is dropped after its last use.

        `needed` tells which of its outputs the value of the function needs. With
        `value_only`, the others are None.
        """
        if (id(jaxpr), needed) not in self._steps:
            self._steps[id(jaxpr), needed] = Steps(jaxpr, needed)
        steps = self._steps[id(jaxpr), needed]
        env = {
            v: self.constant(x, parent)
            for v, x in zip(steps.constvars, steps.consts, strict=True)
        }
        env.update(zip(steps.invars, args, strict=True))
        for eqn, of_results, is_later, done in zip(
            steps.eqns, steps.needed, steps.is_later, steps.done, strict=True
        ):
            if not value_only or any(of_results):
                site = self.site(eqn, parent, of_results, is_later)
                operands = [self._read(env, atom, site) for atom in eqn.invars]
                env.update(zip(eqn.outvars, self.run_eqn(site, operands), strict=True))
            for v in done:
                env.pop(v, None)
        return [
            self._read(env, atom, parent) if is_needed or not value_only else None
            for atom, is_needed in zip(steps.outvars, needed, strict=True)
        ]

    def run_eqn(self, site: Site, operands: Sequence[Any]) -> list[Any]:
        """Runs one equation: an operation, a call or a loop."""
        name, params = site.primitive, site.eqn.params
        if name in ("scan", "while"):
            return self.loop(site, operands)
        if name == "cond":
            branches = params["branches"]
            index = int(self.concrete(operands[0]))
            branch = branches[min(max(index, 0), len(branches) - 1)]
            return self.call(site, branch, operands[1:])
        if name == "shard_map":
            return self.shards(site, operands)
        if name in _ENTER:
            return self.call(site, params[_ENTER[name]], operands)
        return self.equation(site, operands)

    def site(
        self, eqn: Any, parent: Site | None, needed: tuple[bool, ...], is_later: bool
    ) -> Site:
        """The one object that stands for an equation at its place."""
        key = (parent, id(eqn))
        if key not in self._sites:
            self._sites[key] = Site(eqn, parent, needed, is_later)
        return self._sites[key]

    def look_into_shards(
        self, site: Site, operands: Sequence[Any]
    ) -> tuple[list[Any], list[Record]]:
        """Runs a `shard_map`; returns its results and a record of each operation."""

        def run(body, args, record):
            inside = _Recorder(record)
            inside._sites = self._sites
            return inside.run(body, args, site, site.needed)

        return run_shards(site, operands, run)

    def _read(self, env: dict[Any, Any], atom: Any, site: Site | None) -> Any:
        if not is_literal(atom):
            return env[atom]
        key = id(atom)
        if key not in self._literals:
            self._literals[key] = jnp.asarray(atom.val, atom.aval.dtype)
        return self.constant(self._literals[key], site)

    @contextlib.contextmanager
    def iteration(self, number: int) -> Iterator[None]:
        """What runs inside belongs to one iteration of a loop."""
        around = self.iterations
        self.iterations = (*around, number)
        try:
            yield
        finally:
            self.iterations = around

    def _scan(self, site: Site, operands: Sequence[Any]) -> list[Any]:
        params = site.eqn.params
        num_consts, num_carry = scan_arity(params)
        consts = operands[:num_consts]
        carry = operands[num_consts : num_consts + num_carry]
        slices = operands[num_consts + num_carry :]
        numbers = range(params["length"])
        if not numbers:
            return self.equation(site, operands)
        rows: list[Any] = [None] * len(numbers)
        for i in reversed(numbers) if params["reverse"] else numbers:
            with self.iteration(i):
                inside = [*consts, *carry, *self.take(slices, i)]
                outs = self.call(site, params["jaxpr"], inside)
            carry, rows[i] = outs[:num_carry], outs[num_carry:]
        return [*carry, *self.stack(site, rows)]

    def _while(self, site: Site, operands: Sequence[Any]) -> list[Any]:
        params = site.eqn.params
        first = params["cond_nconsts"]
        second = first + params["body_nconsts"]
        cond_consts, body_consts = operands[:first], operands[first:second]
        carry = operands[second:]
        number = 0
        while True:
            with self.iteration(number):
                asked = [*cond_consts, *carry]
                (goes_on,) = self.call(site, params["cond_jaxpr"], asked)
                if not bool(self.concrete(goes_on)):
                    return list(carry)
                inside = [*body_consts, *carry]
                carry = self.call(site, params["body_jaxpr"], inside)
            number += 1


class _Recorder(Interpreter):
    """Runs on tracers: what decides on branches and loops is not known."""

    def __init__(self, record: Callable[..., None]):
        super().__init__()
        self.observe = record

    def run_eqn(self, site, operands):
        if site.primitive in ("scan", "while", "cond", "shard_map"):
            return self.equation(site, operands)
        return super().run_eqn(site, operands)


# Primitives that call a jaxpr of their own operands, and where they keep it.
_ENTER = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "call_jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
}


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Carries out an equation on arrays."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        outs = eqn.primitive.bind(*operands, **params)
    return list(outs) if eqn.primitive.multiple_results else [outs]


@jax.jit
def take(values: list[Any], index: Any) -> list[Any]:
    """Slice `index` of each array along its first axis."""
    return [jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in values]


def stack(values: Sequence[Any]) -> Any:
    """Joins arrays along a new first axis; on the host, where it compiles nothing."""
    if jnp.issubdtype(values[0].dtype, jax.dtypes.prng_key):
        data = stack([jax.random.key_data(x) for x in values])
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(values[0]))
    return jnp.asarray(np.stack([np.asarray(x) for x in values]))
