"""What the examples share: flags, the training loop, checkpoints and Ctrl-C."""

import argparse
import contextlib
import dataclasses
import pathlib
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import results
from tqdm import tqdm

import jaxmp
from jaxmp.errors import InvalidCheckpoint, JaxmpError
from jaxmp.training import Checkpoints

POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")


class Training(NamedTuple):
    """One model under one policy.

    Attributes:
      state: pytree of everything that a run changes.
      train_step: `(state, batch)` to the next state, and `loss`, `loss_scale` and
        `applied`.
      batch: the batch of a step, by the step's number, so that a run can be resumed.
      evaluate: `evaluate(state, in_half=False)`, the score on held-out data.
      params: the parameters in a state.
    """

    state: Any
    train_step: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
    batch: Callable[[int], Any]
    evaluate: Callable[..., float]
    params: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One example, and its defaults.

    Attributes:
      script: path of the example.
      prepare: makes the run of a policy.
      describe: describes the data, in a line.
      score: what `evaluate` returns, in words.
      steps: how many steps are trained.
      growth_interval: finite steps until the loss scale doubles.
      policies: those that are compared.
      target: whose compiler is asked for the memory of a step.
      compiled_step: the step of a policy and its arguments, for that compiler; by
        default those that train here.
      add_flags: adds flags of its own.
      appendix: what it says of the compiled steps, by the names of their policies.
    """

    script: str
    prepare: Callable[[jaxmp.Policy, argparse.Namespace], Training]
    describe: Callable[[argparse.Namespace], str]
    score: str
    steps: int
    growth_interval: int
    policies: tuple[str, ...] = POLICIES
    target: str = "h100"
    compiled_step: Callable[[jaxmp.Policy, argparse.Namespace], Any] | None = None
    add_flags: Callable[[Callable[..., None]], None] = lambda add: None
    appendix: Callable[[dict[str, Any]], str] = lambda rows: ""


def run(experiment: Experiment, argv: list[str] | None = None) -> None:
    """Trains under every requested policy, and compares them."""
    args = read_flags(experiment, argv)
    try:
        if not args.resume:
            start_over(args)
        elif not any(has_checkpoint(args.folders[name]) for name in args.policies):
            raise InvalidCheckpoint(
                f"There is no checkpoint to resume from in {args.checkpoint_dir}. Pass "
                "the --policy, --checkpoint-dir and --out of the run that stopped."
            )
        print(experiment.describe(args))
        runs = [
            train(experiment, name, policy, args)
            for name, policy in args.policies.items()
        ]
        results.report(experiment, runs, args)
    except JaxmpError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        resume = [] if args.resume else ["--resume"]
        command = shlex.join(["python", *sys.argv, *resume])
        print(f"\nInterrupted; saved in {args.checkpoint_dir}. To go on:\n  {command}")
        sys.exit(128 + signal.SIGINT)


def train(
    experiment: Experiment, name: str, policy: jaxmp.Policy, args: argparse.Namespace
) -> results.Run:
    """Trains under one policy, from the newest checkpoint if there is one."""
    training = experiment.prepare(policy, args)
    state, history = fit(training, name, policy, args)
    return results.Run(
        name=name,
        policy=policy,
        history=history,
        metrics={k: x.item() for k, x in jaxmp.loss_scale_metrics(state).items()},
        score=training.evaluate(state),
        half_score=(
            training.evaluate(state, in_half=True) if args.full_eval_in_half else None
        ),
        param_bytes=sum(x.nbytes for x in jax.tree.leaves(training.params(state))),
    )


def fit(
    training: Training, name: str, policy: jaxmp.Policy, args: argparse.Namespace
) -> tuple[Any, results.History]:
    """Takes the steps that are left, and saves checkpoints on the way.

    Returns:
      The last state, and what every step measured.
    """
    train_step = jax.jit(training.train_step, donate_argnums=0)
    state, history = training.state, {name: [] for name in results.HISTORY}
    with Checkpoints(args.folders[name], max_to_keep=2) as checkpoints:
        if checkpoints.latest_step() is not None:
            history = checkpoints.notes()
            state = checkpoints.restore(state, policy=policy, convert=args.convert)
        first = len(history["loss"])
        bar = tqdm(
            range(first, args.steps), name, args.steps, initial=first, unit="step"
        )
        with deferred_interrupt() as interrupted, bar:
            for step in bar:
                began = time.perf_counter()
                state, metrics = train_step(state, training.batch(step))
                metrics = {k: x.item() for k, x in metrics.items()}
                metrics["seconds"] = time.perf_counter() - began
                for key, value in metrics.items():
                    history[key].append(value)
                bar.set_postfix(
                    loss=f"{metrics['loss']:.3f}",
                    scale=results.show_scale(metrics["loss_scale"]),
                    refresh=False,
                )
                if interrupted or step + 1 in (args.steps, *args.checkpoint_steps):
                    checkpoints.save(step + 1, state, policy=policy, notes=history)
                if interrupted:
                    raise KeyboardInterrupt
                jaxmp.raise_if_collapsed(state, max_consecutive_skips=50)
    return state, history


def half_policy(policy: jaxmp.Policy) -> jaxmp.Policy:
    """The policy that computes everything in half precision."""
    compute = policy.compute_dtype
    half = jaxmp.half_dtype() if compute == jnp.float32 else compute
    return jaxmp.Policy(half, half, half)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Lets the running step end before Ctrl-C takes effect; a second one is final."""
    received: list[int] = []

    def remember(signum: int, frame: Any) -> None:
        received.append(signum)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)


def has_checkpoint(folder: pathlib.Path) -> bool:
    """Whether a folder holds a complete checkpoint, which is named by its step."""
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def start_over(args: argparse.Namespace) -> None:
    """Clears the default folder of checkpoints, never one given by the user."""
    if args.checkpoint_dir == args.out / "checkpoints":
        shutil.rmtree(args.checkpoint_dir, ignore_errors=True)
    for folder in args.folders.values():
        if has_checkpoint(folder):
            sys.exit(
                f"{folder} holds checkpoints. Go on from them with --resume, or name "
                "another --checkpoint-dir."
            )


def make_parser(experiment: Experiment) -> argparse.ArgumentParser:
    """The flags of an example; its docstring introduces them."""
    parser = argparse.ArgumentParser(
        description=sys.modules[experiment.prepare.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(flag: str, explanation: str, **options: Any) -> None:
        default = "" if options.get("default") is None else " (default: %(default)s)"
        parser.add_argument(flag, help=explanation + default, **options)

    def switch(flag: str, explanation: str) -> None:
        parser.add_argument(flag, help=explanation, action="store_true")

    policies = " ".join(experiment.policies)
    out = pathlib.Path("out", pathlib.Path(experiment.script).stem)
    add("--policy", f"repeat it for several (default: {policies})", action="append")
    add("--steps", "batches", type=int, default=experiment.steps)
    add("--seed", "of weights and batches", type=int, default=0)
    add(
        "--growth-interval",
        "finite steps until the loss scale doubles",
        type=int,
        default=experiment.growth_interval,
    )
    add("--out", "where the plot goes", type=pathlib.Path, default=out)
    add(
        "--checkpoint-dir",
        "has a folder for each policy if there are several (default: OUT/checkpoints, "
        "which a run without --resume clears)",
        type=pathlib.Path,
    )
    add("--checkpoint-every", "steps", type=int, default=100)
    switch("--resume", "go on from the newest checkpoints")
    switch("--convert", "with --resume: take checkpoints of another policy")
    switch("--full-eval-in-half", "also evaluate with everything in half precision")
    experiment.add_flags(add)
    return parser


def read_flags(
    experiment: Experiment, argv: list[str] | None = None
) -> argparse.Namespace:
    """Reads the command line.

    Returns:
      The flags; also `policies`, a `Policy` by name, `folders`, a folder of checkpoints
      by name, and `checkpoint_steps`, the steps after which to save.
    """
    parser = make_parser(experiment)
    args = parser.parse_args(argv)
    for flag in ("steps", "checkpoint_every"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} counts steps: use 1 or more.")
    try:
        names = split_names(args.policy or experiment.policies)
        args.policies = {name: jaxmp.get_policy(name) for name in names}
    except JaxmpError as error:
        parser.error(str(error))
    args.checkpoint_dir = args.checkpoint_dir or args.out / "checkpoints"
    args.checkpoint_steps = range(0, args.steps, args.checkpoint_every)[1:]
    args.folders = {
        name: args.checkpoint_dir / re.sub(r"[^\w.-]", "_", name) for name in names
    }
    if len(names) == 1:
        args.folders = dict.fromkeys(names, args.checkpoint_dir)
    return args


def split_names(policies: list[str] | tuple[str, ...]) -> list[str]:
    """Splits at commas, but not `params=float32,compute=bfloat16,output=float32`."""
    lists = [[text] if "=" in text else text.split(",") for text in policies]
    return list(dict.fromkeys(name.strip() for names in lists for name in names))
