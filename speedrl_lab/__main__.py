"""Command line: `python -m speedrl_lab list | params NB | run NB knob=value ... | demo`."""

import argparse
import sys
from pathlib import Path

from speedrl_lab import notebooks

USER_ERRORS = (TypeError, ValueError, OSError, notebooks.NotebookError)


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand; a user's error is one line on stderr and exit status 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.command != "run" or any(text.startswith("-") for text in rest)):
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
            case "demo":
                from speedrl_lab import demo

                demo.main(arguments.output)
    except USER_ERRORS as error:
        print(f"speedrl_lab: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("speedrl_lab: interrupted", file=sys.stderr)
        sys.exit(130)


def _knobs(texts: list[str]) -> dict[str, object]:
    knobs: dict[str, object] = {}
    for name, value in map(notebooks.parse_assignment, texts):
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
    demo = commands.add_parser("demo", help="train shortly on the embedded generator, draw the frontier")
    for command in (run, demo):
        command.add_argument("--output", type=Path, metavar="FOLDER", help="where to write")
    return parser


if __name__ == "__main__":
    main()
