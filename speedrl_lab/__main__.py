"""Command line: `python -m speedrl_lab list | params NB | run NB knob=value ... | sweep NB knob=a,b ... | demo`."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speedrl_lab import notebooks

USER_ERRORS = (TypeError, ValueError, OSError, notebooks.NotebookError)


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand; a user's error is one line on stderr and exit status 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.command not in ("run", "sweep") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        match arguments.command:
            case "list":
                for name, question in notebooks.questions().items():
                    print(f"{name:<22}{question}")
            case "params":
                for name, (kind, default, text) in notebooks.parameters(arguments.notebook).items():
                    print(f"{f'{name}: {kind} = {default!r}':<44}{text}")
            case "run":
                knobs = _knobs(arguments.knobs + rest)  # argparse leaves what follows --output
                print(notebooks.run(arguments.notebook, arguments.output, **knobs))
            case "sweep":
                from speedrl_lab import sweep

                knobs = _knobs(arguments.knobs + rest, sweep.parse_assignment)
                table = sweep.run(arguments.notebook, knobs, arguments.name, arguments.workers)
                if (table.status == "failed").any():
                    sys.exit(1)  # the summary has been printed
            case "demo":
                from speedrl_lab import demo

                demo.main(arguments.output)
    except USER_ERRORS as error:
        print(f"speedrl_lab: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("speedrl_lab: interrupted", file=sys.stderr)
        sys.exit(130)


def _knobs(texts: list[str], parse: Callable = notebooks.parse_assignment) -> dict[str, Any]:
    knobs: dict[str, Any] = {}
    for name, value in map(parse, texts):
        if name in knobs:
            raise ValueError(f"{name} is given twice")
        knobs[name] = value
    return knobs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="speedrl_lab", description="Speed-RL workbench.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the notebooks and their questions")
    params = commands.add_parser("params", help="what can be set in a notebook")
    params.add_argument("notebook", help="name, number or path: 03_speed_rl, 03, my.ipynb")
    run = commands.add_parser("run", help="execute a notebook and keep the executed copy")
    run.add_argument("notebook", help="name, number or path: 03_speed_rl, 03, my.ipynb")
    run.add_argument("knobs", nargs="*", metavar="knob=value", help="values are Python literals or words")
    sweep = commands.add_parser("sweep", help="execute a notebook with every combination of values")
    sweep.add_argument("notebook", help="name, number or path: 03_speed_rl, 03, my.ipynb")
    sweep.add_argument("knobs", nargs="*", metavar="knob=a,b,...", help="one value is the same in all trials")
    sweep.add_argument("--name", help="folder below outputs/; the name of an earlier sweep goes on with it")
    sweep.add_argument("--workers", type=int, default=2, help="trials at a time; they share the cores (default: 2)")
    demo = commands.add_parser("demo", help="train shortly on the embedded generator, draw the frontier")
    for command in (run, demo):
        command.add_argument("--output", type=Path, metavar="FOLDER", help="where to write")
    return parser


if __name__ == "__main__":
    main()
