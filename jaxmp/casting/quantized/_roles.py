"""What the operands of each matmul are: weights, activations or cotangents.

A weight is what comes from outside, however it was moved, cast or computed with since,
as long as no matmul and no lookup took part.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxmp._jaxpr.atoms import castable_dtype, is_integer, is_literal
from jaxmp._jaxpr.calls import (
    CUSTOM_JVPS,
    CUSTOM_VJPS,
    KERNELS,
    LOOPS,
    body,
    branches,
    loop,
)
from jaxmp._jaxpr.primitives import CAST, LAYOUT, MATMULS
from jaxmp._jaxpr.scopes import is_backward, is_computed_again
from jaxmp._jaxpr.types import Atom, Eqn, Jaxpr, Var
from jaxmp._jaxpr.versions import open_jaxpr
from jaxmp.casting.quantized._heads import last_matmuls
from jaxmp.quantization.recipe import ACTIVATION, COTANGENT, WEIGHT, Role

BOTH_ACTIVATIONS = "both operands are activations"
OWN_DERIVATIVE = "in a function with a derivative rule of its own"
HEAD = "the head (no other matmul reads its result)"
TIED = "a table that is looked up too"
SAME_INPUT = "both operands are made of the same input"


class Origin(NamedTuple):
    """Where a value comes from.

    Attributes:
      role: what it would be as an operand.
      inputs: of a weight, what it was made from: numbers of inputs, and parts of them.
      has_passed: of a cotangent, whether it has passed a matmul on its way back.
      is_choice: whether it was made of integers, as a one-hot matrix is.
    """

    role: Role
    inputs: frozenset[Any] = frozenset()
    has_passed: bool = False
    is_choice: bool = False


_ACTIVATION = Origin(ACTIVATION)
_CHOICE = Origin(ACTIVATION, is_choice=True)
_CONSTANT = Origin(WEIGHT)
_MOVES = LAYOUT | {CAST}
_CUT = ("start_indices", "limit_indices", "strides")


class MatmulRoles(NamedTuple):
    """What the operands of a matmul are, and why it is left in half by default.

    Attributes:
      roles: of the left and the right operand.
      reason: why it is left in half; empty if nothing speaks against it.
    """

    roles: tuple[Role, Role]
    reason: str = ""


def roles_of(jaxpr: Jaxpr, weight_gradients: frozenset[int]) -> dict[int, MatmulRoles]:
    """The roles of the operands of each `dot_general`, by the id of its equation.

    One that stands in a call which is made from several places has a reason to be left
    in half if it has one in any of them.

    Args:
      jaxpr: of a whole function, backward pass included or not.
      weight_gradients: ids of the matmuls that make the gradients of weights.
    """
    opened = open_jaxpr(jaxpr)
    search = _Search(weight_gradients, last_matmuls(jaxpr))
    inputs = [Origin(WEIGHT, frozenset((i,))) for i in range(len(opened.invars))]
    while True:
        before = search.tables
        search.found = {}
        search.outputs(jaxpr, inputs, in_backward=False)
        if search.tables == before:
            return search.found


class _Search:
    """Reads jaxprs from their first equation to the last.

    Attributes:
      found: what is known of each matmul.
      tables: the inputs that rows are looked up in.
    """

    def __init__(self, weight_gradients: frozenset[int], last: frozenset[int]):
        self.found: dict[int, MatmulRoles] = {}
        self.tables: frozenset[Any] = frozenset()
        self._weight_gradients = weight_gradients
        self._last = last

    def outputs(
        self, jaxpr: Jaxpr, inputs: Sequence[Origin], in_backward: bool
    ) -> list[Origin]:
        """Where the outputs of a jaxpr come from, given where its inputs do."""
        jaxpr = open_jaxpr(jaxpr)
        origins: dict[Var, Origin] = dict.fromkeys(jaxpr.constvars, _CONSTANT)
        origins.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Atom) -> Origin:
            return _CONSTANT if is_literal(atom) else origins[atom]

        for eqn in jaxpr.eqns:
            operands = [*map(read, eqn.invars)]
            results = self.results(eqn, operands, in_backward)
            origins.update(zip(eqn.outvars, results, strict=True))
        return [*map(read, jaxpr.outvars)]

    def results(
        self, eqn: Eqn, operands: Sequence[Origin], in_backward: bool
    ) -> Sequence[Origin]:
        """Where the results of an equation come from."""
        name = eqn.primitive.name
        is_back = (in_backward or is_backward(eqn)) and not is_computed_again(eqn)
        if name in MATMULS:
            return [self.matmul(eqn, operands[0], operands[1], is_back)]
        if name in LOOPS:
            return self.loop(eqn, operands, is_back)
        if name == "cond":
            found = [
                self.outputs(branch, operands[1:], is_back) for branch in branches(eqn)
            ]
            return [_joined(outs) for outs in zip(*found, strict=True)]
        inner = body(eqn)
        if inner is not None and name not in (*CUSTOM_JVPS, *CUSTOM_VJPS):
            return self.outputs(inner, operands, is_back)
        if name == "gather" and castable_dtype(eqn.invars[0]) is not None:
            self.tables |= operands[0].inputs
            return [_ACTIVATION]
        return [_result(eqn, operands, is_back)] * len(eqn.outvars)

    def matmul(self, eqn: Eqn, lhs: Origin, rhs: Origin, is_back: bool) -> Origin:
        """Notes what the operands of a matmul are; returns where its result is from."""
        if is_back and COTANGENT not in (lhs.role, rhs.role):
            is_back = False  # a part of a forward pass that JAX moved
        found = (
            self._backward(eqn, lhs, rhs) if is_back else self._forward(eqn, lhs, rhs)
        )
        before = self.found.get(id(eqn))
        if before is None or not before.reason:
            self.found[id(eqn)] = found
        return Origin(COTANGENT, has_passed=True) if is_back else _ACTIVATION

    def _forward(self, eqn: Eqn, lhs: Origin, rhs: Origin) -> MatmulRoles:
        weight = rhs if rhs.role == WEIGHT else lhs
        roles = (ACTIVATION, WEIGHT) if weight is rhs else (WEIGHT, ACTIVATION)
        if WEIGHT not in (lhs.role, rhs.role):
            return MatmulRoles((ACTIVATION, ACTIVATION), BOTH_ACTIVATIONS)
        if lhs.role == rhs.role:
            # The input and the first weight; the gradient of either is a weight's.
            roles = (WEIGHT, WEIGHT)
        if lhs.inputs & rhs.inputs:
            return MatmulRoles(roles, SAME_INPUT)
        if lhs.is_choice or rhs.is_choice:
            self.tables |= weight.inputs
        if weight.inputs & self.tables:
            return MatmulRoles(roles, TIED)
        return MatmulRoles(roles, HEAD if id(eqn) in self._last else "")

    def _backward(self, eqn: Eqn, lhs: Origin, rhs: Origin) -> MatmulRoles:
        is_left = lhs.role == COTANGENT
        cotangent, other = (lhs, rhs) if is_left else (rhs, lhs)
        is_weight = other.role == WEIGHT and id(eqn) not in self._weight_gradients
        role = WEIGHT if is_weight else ACTIVATION
        roles = (COTANGENT, role) if is_left else (role, COTANGENT)
        if other.is_choice or (is_weight and other.inputs & self.tables):
            return MatmulRoles(roles, TIED)
        if not (is_weight or id(eqn) in self._weight_gradients):
            return MatmulRoles(roles, BOTH_ACTIVATIONS)
        return MatmulRoles(roles, "" if cotangent.has_passed else HEAD)

    def loop(
        self, eqn: Eqn, operands: Sequence[Origin], is_back: bool
    ) -> Sequence[Origin]:
        """What a carry is after some iterations, it may be before each."""
        read, before = loop(eqn), self.found
        _, consts, carried, slices = read.split(operands)
        while True:
            # What is found holds for the carry of any iteration, not of the first.
            self.found = dict(before)
            inputs = (*consts, *carried, *slices)
            outs = self.outputs(read.body, inputs, is_back)
            after = [
                _joined(pair)
                for pair in zip(carried, outs[: read.carries], strict=True)
            ]
            if after == list(carried):
                return [*after, *outs[read.carries :]]
            carried = after


def _result(eqn: Eqn, operands: Sequence[Origin], is_back: bool) -> Origin:
    """Where the results of an ordinary operation come from."""
    name = eqn.primitive.name
    if name == "slice" and operands[0].inputs:
        # Parameters may come in one array: what is cut from it are weights apart.
        part = operands[0].inputs, *(str(eqn.params[key]) for key in _CUT)
        return operands[0]._replace(inputs=frozenset((part,)))
    if name in _MOVES and eqn.invars:
        if is_integer(eqn.invars[0]) and castable_dtype(eqn.outvars[0]) is not None:
            return _CHOICE
        if not is_back or operands[0] != _CONSTANT:
            return operands[0]
    if name in KERNELS or name in CUSTOM_VJPS:
        operands = [*operands, _ACTIVATION]
    origin = _joined(operands)
    if is_back and origin.role != COTANGENT:
        return Origin(COTANGENT)
    return origin


def _joined(origins: Sequence[Origin]) -> Origin:
    """Where a value comes from that is made of some others."""
    cotangents = [origin for origin in origins if origin.role == COTANGENT]
    if cotangents:
        return Origin(COTANGENT, has_passed=any(x.has_passed for x in cotangents))
    if any(origin.role == ACTIVATION for origin in origins):
        return _ACTIVATION
    return Origin(WEIGHT, frozenset().union(*(origin.inputs for origin in origins)))
