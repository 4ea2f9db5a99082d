"""Runs a program one operation at a time, and lets others look at every result.

    class Names(Interpreter):
        def observe(self, site, operands, results):
            print(self.iterations, site.path, site.primitive, site.line, results)

    program = read_program(fn, args, kwargs, policy="mixed_float16", loss_scale=1024)
    outputs = Names().run_program(program)

`observe` sees each operation, in order, with the arrays that it took and gave. Calls
(`jit`, `checkpoint`, custom rules) and loops are entered and never seen themselves, but
for a `quantize`, which is one operation: from an array to small values and scales. A
subclass that overrides `equation` may round, replace or wrap the results. One that
wraps them overrides `constant`, `take` and `stack` as well, `concrete` to unwrap the
numbers that decide on branches, and `shards`.

`site` is one object per place in the program: a dictionary keyed by it sums over the
iterations of a loop, whose numbers, outermost loop first, are in `self.iterations`.

Operations are bound eagerly: JAX compiles each once per shape, every result is rounded
to its dtype, and no rewriting by XLA hides a value. The cost is linear in the number
of operations.

Sharp edges
- Effects (`debug.print`, callbacks) happen as often as the program is run, and with
  `value_only` only where a result is needed.
- In a `shard_map`, floating values have a first axis for the devices, loops and
  branches are one operation each, and `equation` is not asked.
- Primitives that hold jaxprs and are not in `calls.BODY`, such as `pallas_call` and
  `custom_linear_solve`, are one operation.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmp._jaxpr import calls
from jaxmp._jaxpr.atoms import is_literal
from jaxmp._jaxpr.execution import bind, jit_exactly, literal_array
from jaxmp._jaxpr.types import Array, Arrays, Atom, Jaxpr, Var
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.numerics.replay._program import Program
from jaxmp.numerics.replay._schedule import Schedule, Step
from jaxmp.numerics.replay._shards import Observer, Record, run_shards
from jaxmp.numerics.replay._site import ReplaySite


class Interpreter:
    """Runs jaxprs; see the module's docstring.

    Attributes:
      iterations: numbers of the iterations of the loops around, outermost first.
    """

    def __init__(self):
        self.iterations: tuple[int, ...] = ()
        self._sites: dict[tuple[Any, int], ReplaySite] = {}
        self._schedules: dict[tuple[int, tuple[bool, ...]], Schedule] = {}
        self._literals: dict[int, Any] = {}

    # What subclasses override

    def equation(self, site: ReplaySite, operands: Sequence[Any]) -> list[Any]:
        """Carries out one operation."""
        results = bind(site.eqn, operands)
        self.observe(site, operands, results)
        return results

    def observe(self, site: ReplaySite, operands: Arrays, results: Arrays) -> None:
        """Looks at an operation that was carried out."""

    def constant(self, value: jax.Array, site: ReplaySite | None) -> Any:
        """A literal of the equation at `site`, or a constant of the program."""
        del site
        return value

    def take(self, values: Sequence[Any], index: int) -> list[Any]:
        """The slices with which a scan enters an iteration."""
        return _take(list(values), np.int32(index))

    def stack(self, site: ReplaySite, rows: Sequence[Sequence[Any]]) -> list[Any]:
        """Joins what the iterations of a scan gave, in the order of their slices."""
        del site
        return [_stack(column) for column in zip(*rows, strict=True)]

    def concrete(self, value: Any) -> Array:
        """The array that a value stands for."""
        return value

    def loop(self, site: ReplaySite, operands: Sequence[Any]) -> list[Any]:
        """Runs a scan or a while loop, iteration by iteration."""
        run = self._scan if site.primitive == "scan" else self._while
        return run(site, operands)

    def call(
        self, site: ReplaySite, jaxpr: Jaxpr, operands: Sequence[Any]
    ) -> list[Any]:
        """Runs the body of a call, of a branch, or of one iteration."""
        needed = site.needed
        if site.primitive in calls.LOOPS:
            # The next iteration needs what is carried.
            carries = calls.loop(site.eqn).carries
            count = len(open_jaxpr(jaxpr).outvars)
            needed = ((True,) * carries + needed[carries:])[:count]
        return self.run(jaxpr, operands, site, needed)

    def shards(self, site: ReplaySite, operands: Sequence[Any]) -> list[Any]:
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
        is_value = tuple(output.kind != "gradient" for output in program.outputs)
        with jax.debug_nans(False), jax.debug_infs(False):
            outs = self.run(program.jaxpr, inputs, None, is_value, value_only)
        return list(itertools.compress(outs, is_value)) if value_only else outs

    def run(
        self,
        jaxpr: Jaxpr,
        args: Sequence[Any],
        parent: ReplaySite | None,
        needed: tuple[bool, ...],
        value_only: bool = False,
    ) -> list[Any]:
        """Runs a jaxpr; a value is dropped after its last use.

        Args:
          jaxpr: what to run.
          args: its arguments.
          parent: the site of the call or loop that holds it, or None.
          needed: which of its outputs the value of the function needs.
          value_only: leave out what only the other outputs need, which are None then.
        """
        if (id(jaxpr), needed) not in self._schedules:
            self._schedules[id(jaxpr), needed] = Schedule(jaxpr, needed)
        schedule = self._schedules[id(jaxpr), needed]
        env: dict[Var, Any] = dict(zip(schedule.invars, args, strict=True))
        for v, x in zip(schedule.constvars, schedule.consts, strict=True):
            env[v] = self.constant(x, parent)
        for step in schedule.steps:
            if not value_only or any(step.needed):
                site = self._site(step, parent)
                operands = [self._read(env, atom, site) for atom in step.eqn.invars]
                results = self.run_eqn(site, operands)
                env.update(zip(step.eqn.outvars, results, strict=True))
            for v in step.done:
                env.pop(v, None)
        return [
            self._read(env, atom, parent) if is_needed or not value_only else None
            for atom, is_needed in zip(schedule.outvars, needed, strict=True)
        ]

    def run_eqn(self, site: ReplaySite, operands: Sequence[Any]) -> list[Any]:
        """Runs one equation: an operation, a call or a loop."""
        name = site.primitive
        if name in calls.LOOPS:
            return self.loop(site, operands)
        if name == "cond":
            branches = calls.branches(site.eqn)
            index = int(self.concrete(operands[0]))
            branch = branches[min(max(index, 0), len(branches) - 1)]
            return self.call(site, branch, operands[1:])
        if name == "shard_map":
            return self.shards(site, operands)
        if name in calls.BODY:
            return self.call(site, site.eqn.params[calls.BODY[name]], operands)
        return self.equation(site, operands)

    def look_into_shards(
        self, site: ReplaySite, operands: Arrays
    ) -> tuple[list[Array], list[Record]]:
        """Runs a `shard_map`; returns its results and a record of each operation."""

        def run(body: Jaxpr, args: Arrays, record: Observer) -> list[Array]:
            inside = _Recorder(record)
            inside._sites = self._sites
            return inside.run(body, args, site, site.needed)

        return run_shards(site, operands, run)

    def _site(self, step: Step, parent: ReplaySite | None) -> ReplaySite:
        """The one object that stands for an equation at its place."""
        key = (parent, id(step.eqn))
        if key not in self._sites:
            self._sites[key] = ReplaySite(step.eqn, parent, step.needed, step.is_later)
        return self._sites[key]

    def _read(self, env: dict[Var, Any], atom: Atom, site: ReplaySite | None) -> Any:
        if not is_literal(atom):
            return env[atom]
        key = id(atom)
        if key not in self._literals:
            self._literals[key] = literal_array(atom)
        return self.constant(self._literals[key], site)

    @contextlib.contextmanager
    def _iteration(self, number: int) -> Iterator[None]:
        """What runs inside belongs to one iteration of a loop."""
        around = self.iterations
        self.iterations = (*around, number)
        try:
            yield
        finally:
            self.iterations = around

    def _scan(self, site: ReplaySite, operands: Sequence[Any]) -> list[Any]:
        loop = calls.loop(site.eqn)
        _, consts, carry, slices = loop.split(operands)
        if not loop.length:
            return self.equation(site, operands)
        rows: list[Any] = [None] * loop.length
        numbers = range(loop.length)
        for i in reversed(numbers) if site.eqn.params["reverse"] else numbers:
            with self._iteration(i):
                inside = [*consts, *carry, *self.take(slices, i)]
                outs = self.call(site, loop.body, inside)
            carry, rows[i] = outs[: loop.carries], outs[loop.carries :]
        return [*carry, *self.stack(site, rows)]

    def _while(self, site: ReplaySite, operands: Sequence[Any]) -> list[Any]:
        loop = calls.loop(site.eqn)
        of_condition, consts, carry, _ = loop.split(operands)
        number = 0
        while True:
            with self._iteration(number):
                (goes_on,) = self.call(site, loop.condition, [*of_condition, *carry])
                if not self.concrete(goes_on):
                    return list(carry)
                carry = self.call(site, loop.body, [*consts, *carry])
            number += 1


class _Recorder(Interpreter):
    """Runs on tracers: what decides on branches and loops is not known."""

    def __init__(self, record: Observer):
        super().__init__()
        self._record = record

    def observe(self, site: ReplaySite, operands: Arrays, results: Arrays) -> None:
        self._record(site, operands, results)

    def run_eqn(self, site: ReplaySite, operands: Sequence[Any]) -> list[Any]:
        if site.primitive in (*calls.LOOPS, "cond", "shard_map"):
            return self.equation(site, operands)
        return super().run_eqn(site, operands)


class CompiledLoops(Interpreter):
    """Runs operation by operation, and loops, which need no looking into, as one."""

    def __init__(self):
        super().__init__()
        self._loops: dict[int, Callable[..., list[Array]]] = {}

    def loop(self, site: ReplaySite, operands: Arrays) -> list[Array]:
        key = id(site.eqn)
        if key not in self._loops:
            self._loops[key] = jit_exactly(lambda *values: bind(site.eqn, values))
        return self._loops[key](*operands)


@jax.jit
def _take(values: list[Array], index: Array) -> list[Array]:
    """Slice `index` of each array along its first axis."""
    return [jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in values]


def _stack(values: Arrays) -> jax.Array:
    """Joins arrays along a new first axis; on the host, where it compiles nothing."""
    if jnp.issubdtype(values[0].dtype, jax.dtypes.prng_key):
        data = _stack([jax.random.key_data(x) for x in values])
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(values[0]))
    return jnp.asarray(np.stack([np.asarray(x) for x in values]))
