"""What a policy does to the numbers of a loss function, and what to do about it.

The function runs on its arguments, operation by operation, in float32 and under the
policy as autocast applies it.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxmp._views import html as _html
from jaxmp._views.numbers import power
from jaxmp._views.result import plain
from jaxmp.cli._load import load_function, make_step, takes_policy
from jaxmp.cli._output import Output
from jaxmp.errors import InvalidStep
from jaxmp.numerics import (
    Comparison,
    NonfiniteReport,
    Trace,
    compare,
    find_nonfinite,
    trace,
)
from jaxmp.numerics.compare.rows import GradientRow, PolicyRow
from jaxmp.report.compile.progress import Progress

KINDS = ("nonfinite", "underflow", "inaccurate")
_LOST = 0.001
# The default max_scale of jaxmp.dynamic_loss_scaling.
_LARGEST_SCALE = 2.0**24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "step",
        help="MODULE:FUNCTION or FILE.py:FUNCTION; the function returns (loss_fn, "
        "*args), with arrays that hold numbers; if it takes a policy, it is given "
        "float32",
    )
    parser.add_argument(
        "--policy",
        default="mixed_float16",
        help="what the function is meant to compute in (%(default)s)",
    )


def run(options: argparse.Namespace, progress: Progress) -> Output:
    """Diagnoses the function."""
    progress.say(f"loading {options.step}")
    function = load_function(options.step)
    given = ("float32",) if takes_policy(function) else ()
    progress.say("making the function and its arguments")
    loss_fn, *args = make_step(function, *given)
    _check_concrete(options.step, args)
    compared, found = _look(loss_fn, options.policy, args, progress)
    row = compared.policies[0]
    progress.say(f"running it operation by operation in {row.dtype}")
    traced = trace(loss_fn, dtype=row.dtype, loss_scale=row.loss_scale)(*args)
    kinds = _kinds(found, compared)
    advice = _advise(found, traced, compared, kinds)
    tables = [str(found)] * bool(found) + [str(compared), str(traced)]
    page = _html.writer(
        f"Diagnosis under {options.policy}",
        *map(_html.paragraph, advice),
        *map(_html.preformatted, tables),
    )
    data = {
        "policy": options.policy,
        "kinds": sorted(kinds),
        "advice": advice,
        "nonfinite": _lists(dataclasses.asdict(found)) if found else None,
        "comparison": json.loads(compared.to_json()),
        "trace": plain(traced.to_rows()),
    }
    text = "\n\n".join([*advice, *tables])
    return Output(text=text, data=data, to_html=page, kinds=kinds)


def _look(
    loss_fn: Any, policy: str, args: Sequence[Any], progress: Progress
) -> tuple[Comparison, NonfiniteReport]:
    """Compares and runs the function at a loss scale at which it does not overflow.

    The scale that is worked out comes from numbers that were rounded in bfloat16, and
    may be a little too high. What a lower one mends is not worth reporting.
    """
    progress.say(f"comparing {policy} with float32")
    compared = compare(loss_fn, policy, *args)
    progress.say("looking for what is not finite")
    scale = compared.policies[0].loss_scale
    found = find_nonfinite(loss_fn, *args, policy=policy, loss_scale=scale)
    lower = found.finite_at_scale
    if lower is None or lower < 1:
        return compared, found
    progress.say(f"comparing again at loss scale {power(lower)}")
    compared = compare(loss_fn, policy, *args, loss_scale=lower)
    row = compared.policies[0]
    largest = min(row.largest_scale or lower, lower)
    row = dataclasses.replace(row, largest_scale=largest)
    compared = dataclasses.replace(compared, policies=(row,))
    return compared, NonfiniteReport(loss_scale=lower)


def _check_concrete(step: str, args: Sequence[Any]) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(args):
        if isinstance(x, jax.ShapeDtypeStruct):
            name = jax.tree_util.keystr(path[1:])
            raise InvalidStep(
                f"{step} returned the argument {path[0].idx + 1}{name} as {x}, which "
                "holds no numbers to diagnose. Return arrays: initialised or trained "
                "parameters, and a batch."
            )


def _kinds(found: NonfiniteReport, compared: Comparison) -> frozenset[str]:
    row = compared.policies[0]
    errors = [row.output_error, row.gradient_error or 0.0]
    conditions = {
        "nonfinite": bool(found) or any(r.nonfinite for r in compared.gradients),
        "underflow": row.largest_scale is not None
        and any(r.zeroed > _LOST for r in compared.gradients),
        "inaccurate": any(row.limit < error < math.inf for error in errors),
    }
    return frozenset(kind for kind, holds in conditions.items() if holds)


def _advise(
    found: NonfiniteReport, traced: Trace, compared: Comparison, kinds: frozenset[str]
) -> list[str]:
    """What to do, in sentences."""
    row = compared.policies[0]
    advice = []
    if found:
        where = f" at {found.file}:{found.line}" if found.file else ""
        advice.append(
            f"Not finite{where}{_in(found.path)}: {found.cause}. {found.repair}"
        )
    elif "nonfinite" in kinds:
        worst = next(r for r in compared.gradients if r.nonfinite)
        advice.append(f"Not finite: the gradient of {worst.parameter}.")
    if "inaccurate" in kinds:
        worst = next(r for r in compared.activations if math.isfinite(r.relative_error))
        advice.append(
            f"Inaccurate: outputs are off by {row.output_error:.1%}"
            f"{_gradients_are_off(row)}. Look at {worst.operation} at {worst.source}"
            f"{_in(worst.path)} first, which is off by {worst.relative_error:.1%}."
        )
    if "underflow" in kinds:
        worst = max(compared.gradients, key=lambda r: r.zeroed)
        advice.append(
            f"Underflow: {worst.zeroed:.1%} of the gradient of {worst.parameter} "
            f"become zero, even at loss scale {power(row.loss_scale)}."
        )
    if kinds:
        advice.append(
            "jaxmp.numerics.search_policy finds what has to stay in "
            f"{'float32, or in half' if compared.matmuls else 'float32'}, and returns "
            "rules for autocast and apply_policy."
        )
    else:
        advice.append(
            f"{row.policy} is fine here: outputs are off by {row.output_error:.2%}"
            f"{_gradients_are_off(row)}."
        )
    if found.kind != "divergence":
        advice += _on_scales(row, compared.gradients)
    worst = next((r for r in traced.rows if r.path != "loss_scale"), None)
    if worst is not None and worst.kind != "fine":
        name = worst.file.rpartition("/")[2]
        advice.append(
            f"If everything were in {traced.dtype}: {traced.summary}. The worst is "
            f"{worst.operation} at {name}:{worst.line}{_in(worst.path)}."
        )
    return advice


def _on_scales(row: PolicyRow, gradients: tuple[GradientRow, ...]) -> list[str]:
    """What to do about the loss scale."""
    if row.largest_scale is None or row.smallest_scale is None:
        return [] if row.loss_scale is None else ["No loss scaling is needed."]
    largest, smallest = row.largest_scale, row.smallest_scale
    start = min(max(smallest, 1.0), largest, _LARGEST_SCALE)
    lost = max((r.zeroed_unscaled for r in gradients), default=0.0)
    advice = f"Loss scale: nothing overflows up to {power(largest)}"
    if smallest <= largest:
        advice += f", and nothing becomes subnormal from {power(smallest)} on"
    else:
        advice += (
            f", where {row.lost_at_largest:.2%} of the backward pass still become zero"
        )
    advice += f"; at scale 1, {f'up to {lost:.1%}' if lost else 'nothing'} of a "
    advice += "gradient becomes zero."
    if start > 1:
        advice += (
            " Start at jaxmp.loss_scaling(tx, policy, "
            f"init_scale=2.0**{math.log2(start):.0f})."
        )
    return [advice]


def _gradients_are_off(row: PolicyRow) -> str:
    if row.gradient_error is None:
        return ""
    return f", gradients by up to {row.gradient_error:.2%}"


def _in(path: str) -> str:
    return f" in {path}" if path else ""


def _lists(value: Any) -> Any:
    """As `plain`, with named tuples as lists."""
    if isinstance(value, dict):
        return {name: _lists(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lists(x) for x in value]
    return plain(value)
