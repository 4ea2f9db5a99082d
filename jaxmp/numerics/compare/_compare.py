"""`compare`: what each policy does to the activations and gradients of a function.

    reference   fn in float32
    policy      autocast(fn, policy), forward              ->  activations, by operation
                the same with its gradient, in bfloat16    ->  what loss scale it needs
                the same with its gradient, at that scale  ->  gradients, by parameter

Sharp edges
- All activations of the reference are kept in memory while the others are compared.
- Of a policy, `compute_dtype` and `matmul_precision` are used, as `autocast` does.
- Operations are carried out one at a time, and every result is rounded: XLA may round
  less.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmp import _tree
from jaxmp.errors import NumericsError
from jaxmp.numerics.compare._distance import Distance, share_least
from jaxmp.numerics.compare._result import (
    ActivationRow,
    Comparison,
    GradientRow,
    PolicyRow,
)
from jaxmp.numerics.compare._runs import (
    Comparing,
    Reference,
    Rounding,
)
from jaxmp.numerics.compare._scales import (
    ScaleRange,
    needs_scale,
    scale_range,
    stand_in,
    stand_in_rules,
)
from jaxmp.numerics.replay._interpreter import Interpreter
from jaxmp.numerics.replay._program import Program, read_program
from jaxmp.numerics.replay._site import ReplaySite
from jaxmp.policy import Policy, get_policy

_REFERENCES = ("float32", "float64")


def compare(
    fn: Callable[..., Any],
    policies: Any,
    *args: Any,
    rules: Sequence[Any] = (),
    loss_scale: Any = None,
    argnums: int | Sequence[int] = 0,
    reference: str = "float32",
    **kwargs: Any,
) -> Comparison:
    """Compares a function with itself under policies, layer by layer.

    A check before a long run: what each policy does to activations and gradients, and
    which loss scales its backward pass needs. Formats that have no arithmetic, such as
    float8, are emulated: what autocast would compute in half is rounded to them.

    Args:
      fn: function that can be jitted. If it returns a floating scalar, alone or first
        in a tuple, that is the loss, and gradients are compared as well. nnx modules
        may be arguments.
      policies: a policy, or a sequence of them: what `get_policy` takes. Each is
        applied by `autocast`.
      *args: what the function is called with.
      rules: of `autocast`, for every policy.
      loss_scale: what the losses are multiplied by before the backward pass: a number,
        an optimizer state or a `LossScale`. None takes for each policy the smallest
        power of two at which nothing becomes zero or subnormal, or, if something
        overflows there, the largest at which nothing does; but never less than 1.
      argnums: arguments to differentiate with respect to.
      reference: `"float32"`, or `"float64"` while x64 is enabled: what the floating
        arguments are cast to for the reference.
      **kwargs: passed on to `fn`.

    Returns:
      A `Comparison`, whose rows are sorted worst first.

    Raises:
      NumericsError: for a `reference` that is none, or no policy at all.
      PolicyError: for a policy that cannot be read.

    References:
      Micikevicius et al., "Mixed Precision Training", 2018,
      https://arxiv.org/abs/1710.03740, section 3.2, on loss scales.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxmp.numerics import compare
      >>> def loss(w, x):
      ...     return jnp.mean((x @ w) ** 2) * 1e-6
      >>> w, x = jnp.full((4, 2), 0.5), jnp.ones((8, 4))
      >>> compared = compare(loss, ["bfloat16", "float16"], w, x)
      >>> row = compared.policy("float16")
      >>> row.smallest_scale, row.largest_scale, row.gradient_error < 1e-3
      (256.0, 17179869184.0, True)
    """
    specs = _read_policies(policies)
    options = {"rules": rules, "argnums": argnums}
    wide_args, wide_kwargs = _widen((args, kwargs), _read_reference(reference))
    exact = _Exact(fn, wide_args, wide_kwargs, argnums)
    rows, activations, gradients = [], [], []
    for name, policy in specs.items():
        run = _Run(fn, args, kwargs, policy, options)
        activations += run.activations(name, exact.activations)
        outputs = Distance()
        for wanted, value in zip(exact.outputs, run.outputs, strict=True):
            if _tree.is_inexact(wanted):
                outputs.add(wanted, value)
        fits, scale, found = None, None, []
        if exact.gradients:
            fits = run.fits()
            scale = loss_scale
            if scale is None:
                scale = 1.0 if fits is None else fits.suggested
            found, scale = run.gradients(name, exact.gradients, scale)
        gradients += found
        rows.append(_policy_row(name, run, outputs, fits, scale, found))
    activations.sort(key=_worst_first)
    gradients.sort(key=_worst_first)
    return Comparison(
        reference=reference,
        policies=tuple(rows),
        activations=tuple(activations),
        gradients=tuple(gradients),
    )


class _Exact:
    """The function in float32 or float64.

    Attributes:
      activations: every one.
      outputs: of the function.
      gradients: by name; empty without a loss.
    """

    def __init__(self, fn, args, kwargs, argnums):
        forward = read_program(fn, args, kwargs, backward=False)
        self.activations = Reference()
        self.outputs = self.activations.run_program(forward)
        program = read_program(fn, args, kwargs, argnums=argnums)
        self.gradients: dict[str, Any] = {}
        if program.loss_scale is not None:
            self.gradients = program.gradients(Interpreter().run_program(program))


class _Run:
    """The function under one policy.

    Attributes:
      emulated: the format that stands in for bfloat16, None if JAX computes in it.
      outputs: of the function, once `activations` has run it.
    """

    def __init__(self, fn, args, kwargs, policy, options):
        self.call = fn, args, kwargs
        self.options = options
        self.dtype = jnp.dtype(policy.compute_dtype)
        self.emulated = None if self.dtype.itemsize > 1 else self.dtype
        self.stand_in = stand_in(policy)
        self.policy = policy if self.emulated is None else self.stand_in
        self.outputs: Sequence[Any] = ()

    def _read(self, policy: Policy, **options: Any) -> Program:
        return read_program(*self.call, policy=policy, **self.options, **options)

    def activations(self, name: str, reference: Reference) -> list[ActivationRow]:
        """Runs the function and compares what it computes."""
        comparing = Comparing(reference, self.emulated)
        self.outputs = comparing.run_program(self._read(self.policy, backward=False))
        return [
            _activation_row(name, i, site, *found)
            for i, (site, found) in enumerate(comparing.distances().items())
        ]

    def fits(self) -> ScaleRange | None:
        """The loss scales for its backward pass, if its format has a small range."""
        if not needs_scale(self.dtype):
            return None
        options = {**self.options, "rules": stand_in_rules(self.options["rules"])}
        program = read_program(
            *self.call, policy=self.stand_in, backward=True, **options
        )
        return scale_range([program], self.dtype)

    def gradients(
        self, name: str, wanted: dict[str, Any], loss_scale: Any
    ) -> tuple[list[GradientRow], float]:
        """Compares the gradients; returns the loss scale that was used, too."""
        program = self._read(self.policy, backward=True, loss_scale=loss_scale)
        scale = program.used_scale
        given = program.gradients(Rounding(self.emulated).run_program(program))
        unscaled = given
        if scale != 1.0:
            at_one = program.at_scale(1.0)
            unscaled = at_one.gradients(Rounding(self.emulated).run_program(at_one))
        found, plain = ({name: Distance() for name in wanted} for _ in range(2))
        for parameter, x in wanted.items():
            found[parameter].add(x, given[parameter], scale)
            plain[parameter].add(x, unscaled[parameter])
        share_least(found.values())
        rows = [
            GradientRow(
                policy=name,
                parameter=parameter,
                zeroed_unscaled=plain[parameter].underflow,
                **_figures(distance),
            )
            for parameter, distance in found.items()
        ]
        return rows, scale


def _activation_row(
    policy: str, order: int, site: ReplaySite, distance: Distance, dtype: str
) -> ActivationRow:
    line = site.line
    return ActivationRow(
        policy=policy,
        path=site.path,
        operation=site.primitive,
        file="" if line is None else line.file,
        line=0 if line is None else line.line,
        function="" if line is None else line.function,
        order=order,
        dtype=dtype,
        **_figures(distance),
    )


def _figures(distance: Distance) -> dict[str, Any]:
    return {
        "relative_error": distance.relative_error,
        "cosine": distance.cosine,
        "snr": distance.snr,
        "zeroed": distance.underflow,
        "nonfinite": distance.nonfinite,
        "size": distance.size,
    }


def _policy_row(name, run, outputs, fits, scale, gradients) -> PolicyRow:
    return PolicyRow(
        policy=name,
        dtype=str(run.dtype),
        is_emulated=run.emulated is not None,
        output_error=outputs.relative_error,
        gradient_error=max((row.relative_error for row in gradients), default=None),
        loss_scale=scale,
        largest_scale=fits and fits.largest,
        smallest_scale=fits and fits.smallest,
        lost_unscaled=fits and fits.lost_unscaled,
        lost_at_largest=fits and fits.lost_at_largest,
    )


def _worst_first(row: ActivationRow | GradientRow) -> tuple[float, float]:
    return -row.relative_error, -row.zeroed


def _read_policies(policies: Any) -> dict[str, Policy]:
    is_one = isinstance(policies, str) or not isinstance(policies, Sequence)
    specs = [policies] if is_one else list(policies)
    if not specs:
        raise NumericsError(
            "policies=[] compares nothing. Write policies=['bfloat16', 'float16']."
        )
    return {
        spec if isinstance(spec, str) else str(get_policy(spec)): get_policy(spec)
        for spec in specs
    }


def _read_reference(reference: str) -> Any:
    if reference not in _REFERENCES:
        raise NumericsError(
            f"reference={reference!r} is none. Write reference='float32', or 'float64' "
            "while x64 is enabled."
        )
    if reference == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore
        raise NumericsError(
            "reference='float64' needs 64-bit arrays, which JAX has turned off. Write "
            "jax.config.update('jax_enable_x64', True), or with jax.enable_x64(True)."
        )
    return jnp.dtype(reference)


def _widen(tree: Any, dtype: Any) -> Any:
    """Casts the floating arrays of a tree that are not float8."""

    def widen(x):
        if not _tree.is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return jnp.asarray(x, dtype) if x.dtype.itemsize > 1 else x

    return jax.tree.map(widen, tree)
