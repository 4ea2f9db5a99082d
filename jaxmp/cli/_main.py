"""Reads the command line, runs a command, and shows its result."""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence

from jaxmp.cli import _audit, _diagnose, _doctor, _policy, _report
from jaxmp.errors import JaxmpError
from jaxmp.report.compile.progress import Progress

_COMMANDS = {
    "doctor": _doctor,
    "policy": _policy,
    "report": _report,
    "audit": _audit,
    "diagnose": _diagnose,
}
_FOUND, _FAILED = 1, 2
_PATIENCE = 2.0
_EXIT_CODES = """\
exit status:
  0  the command ran, and found nothing that --fail-on names
  1  it found something that --fail-on names
  2  it did not run: a mistake in the command or in what it names, something that is
     not installed, a file that cannot be written, or a failure inside
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      arguments: of the command line, without the program's name; by default those of
        this process.

    Returns:
      The exit status: 0; 1 if something that `--fail-on` names was found, and for no
      other reason; 2 if the command could not run.

    Example:
      >>> from jaxmp.cli import main
      >>> main(["policy", "float32", "--json"])  # doctest: +ELLIPSIS
      {
      ...
      }
      0
    """
    options = _parser().parse_args(arguments)
    command = _COMMANDS[options.command]
    try:
        with Progress(not options.quiet, patience=_PATIENCE) as progress:
            output = command.run(options, progress)
        if options.html:
            output.to_html(options.html)
    except (JaxmpError, OSError) as error:
        print(f"jaxmp {options.command}: {error}", file=sys.stderr)
        return _FAILED
    except Exception as error:
        # Python would end with status 1, which says that something was found.
        traceback.print_exc()
        print(f"jaxmp {options.command}: failed with {error!r}", file=sys.stderr)
        return _FAILED
    _print(json.dumps(output.data, indent=2) if options.json else output.text)
    found = sorted(output.kinds.intersection(options.fail_on))
    if found:
        print(f"jaxmp {options.command}: found {', '.join(found)}", file=sys.stderr)
    return _FOUND if found else 0


def _print(text: str) -> None:
    """Prints a result, also where nobody reads it to its end, as in `| head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxmp",
        description="Looks at mixed precision in JAX.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        first = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(
            name,
            help=first,
            description=module.__doc__,
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("--html", metavar="FILE", help="write a page, too")
        command.add_argument(
            "--quiet", action="store_true", help="do not report progress"
        )
        command.add_argument(
            "--fail-on",
            action="append",
            default=[],
            choices=module.KINDS,
            help="exit with status 1 if this was found; may be repeated",
        )
    return parser
