"""Command line: `python -m speedrl_lab` or `speedrl`, with list, params, run, sweep, runs, report and demo."""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from speedrl_lab import notebooks
from speedrl_lab.config import nearest
from speedrl_lab.runs import outputs_root

USER_ERRORS = (TypeError, ValueError, OSError, ImportError, notebooks.NotebookError)
FEW = 6  # settings that are shown beside the table of runs
NOTEBOOK = "name, number or path: 03_speed_rl, 03, my.ipynb"
RUNS = "run, or folder of runs, below outputs/ (default: all)"


def main(argv: list[str] | None = None) -> None:
    """Run one subcommand; a user's error is one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if not argv:
        parser.print_help()
        return
    _check_command(parser, argv[0])
    arguments, rest = parser.parse_known_args(argv)
    try:
        _check_rest(arguments, rest)
        _run(arguments, rest)
    except USER_ERRORS as error:
        print(f"speedrl_lab: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("speedrl_lab: interrupted", file=sys.stderr)
        sys.exit(130)


def _run(arguments: argparse.Namespace, rest: list[str]) -> None:
    match arguments.command:
        case "list":
            for name, question in notebooks.questions().items():
                print(f"{name:<22}{question}")
        case "params":
            for name, (kind, default, text) in notebooks.parameters(arguments.notebook).items():
                print(f"{f'{name}: {kind} = {default!r}':<44}{text}")
        case "run":
            knobs = _knobs(arguments.knobs + rest)  # argparse leaves what follows --output
            print(_run_notebook(arguments.notebook, arguments.output, knobs))
        case "train":
            from speedrl_lab import training

            folder = training.run(_knobs(arguments.knobs + rest))
            if folder is not None:  # in one of several processes
                print(folder)
        case "sweep":
            from speedrl_lab import sweep

            knobs = _knobs(arguments.knobs + rest, sweep.parse_assignment)
            table = sweep.run(
                arguments.notebook, knobs, arguments.name, arguments.workers, arguments.backend, arguments.cpus,
                arguments.gpus,
            )  # fmt: skip
            if (table.status == "failed").any():
                sys.exit(1)  # the summary has been printed
        case "runs" if arguments.delete:
            from speedrl_lab import trash

            print(f"{arguments.delete} -> {trash.delete(arguments.delete, arguments.force)}\n{trash.emptying()}")
        case "runs":
            _show_runs(arguments.places, " ".join(arguments.filter))
        case "report":
            from speedrl_lab import report

            print(report.write(arguments.places, arguments.output))
        case "demo":
            from speedrl_lab import demo

            demo.main(arguments.output)


def _run_notebook(notebook: str, output: Path | None, knobs: dict[str, Any]) -> Path:
    """Execute a notebook; one that makes a `page` finds it beside its executed copy, unless the knob says where."""
    if "page" in notebooks.parameters(notebook) and "page" not in knobs:
        stem = notebooks.notebook_path(notebook).stem
        output = output or outputs_root() / stem / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        knobs = knobs | {"page": str((output / "report.html").resolve())}
    return notebooks.run(notebook, output, **knobs)


def _show_runs(places: Sequence[str], text: str) -> None:
    """Print the table of runs, and the settings that differ where these are few."""
    from speedrl_lab import comparison

    runs = comparison.find(places)
    chosen = comparison.matching(runs, text)
    if not chosen:
        print(f"none of {len(runs)} runs matches {text!r}")
        return
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print(comparison.as_text(comparison.shown(comparison.table(chosen)), width))
    trained = [run for run in chosen if not run.records.empty]
    if len(trained) < 2:
        return
    different = comparison.differing(trained)
    names = list(different.columns)
    if 0 < len(names) <= FEW:
        print(f"\nsettings that differ:\n{comparison.as_text(different.reset_index(), width)}")
    else:
        more = f", ... ({len(names)} in all; notebook 07_compare_runs shows them)" if len(names) > FEW else ""
        print(f"\nsettings that differ: {', '.join(names[:FEW]) or 'none'}{more}")


def _knobs(texts: list[str], parse: Callable = notebooks.parse_assignment) -> dict[str, Any]:
    knobs: dict[str, Any] = {}
    for name, value in map(parse, texts):
        if name in knobs:
            raise ValueError(f"{name} is given twice")
        knobs[name] = value
    return knobs


class _OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    def error(self, message: str) -> NoReturn:
        print(f"speedrl_lab: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def _check_command(parser: argparse.ArgumentParser, given: str) -> None:
    if given not in COMMANDS and not given.startswith("-"):
        parser.error(f"unknown command {given!r}; nearest: {nearest(given, list(COMMANDS))!r}")


def _check_rest(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Raise ValueError for what no command reads; knobs may stand after an option."""
    flags = [text for text in rest if text.startswith("-")]
    if flags:
        known = [f"--{name}" for name in vars(arguments) if name in OPTIONS] + ["--help"]
        raise ValueError(f"unknown option {flags[0]!r} of {arguments.command}; nearest: {nearest(flags[0], known)!r}")
    if rest and arguments.command not in ("run", "train", "sweep"):
        raise ValueError(f"{arguments.command} does not take {rest[0]!r}")


OPTIONS = ("output", "name", "workers", "backend", "cpus", "gpus", "filter", "delete", "force")
COMMANDS = {
    "list": ("the notebooks and the question each one answers", ""),
    "params": ("what can be set in a notebook: names, types, defaults", "speedrl params 03"),
    "run": (
        "execute a notebook without a browser and keep the executed copy; nothing is overwritten",
        "speedrl run 03 run=mine speed_weight=0.5 iterations=40",
    ),
    "train": (
        "a training run without a notebook; start several processes of it with torchrun or accelerate launch",
        "speedrl train preset=smoke run=mine\n"
        "  accelerate launch --multi_gpu --num_processes 8 -m speedrl_lab train preset=amused-256 "
        "generator=amused:<folder> prompt_file=<file>",
    ),
    "sweep": (
        "execute a notebook with every combination of values; the same --name goes on with it",
        "speedrl sweep 03 preset=sweep speed_weight=0,0.5,1 seed=0,1 --name weights\n"
        "  speedrl sweep 03 preset=emoji-gpu seed=0,1,2,3 --name seeds --backend ray --cpus 4 --gpus 0.5",
    ),
    "runs": (
        "what has been trained: a table of runs, with the settings in which they differ; or delete one",
        "speedrl runs --filter speed_weight=0.5\n  speedrl runs weights\n  speedrl runs --delete mine",
    ),
    "report": (
        "one HTML page of some runs that needs no network and can be mailed",
        "speedrl report weights --output weights.html",
    ),
    "demo": ("train shortly on the embedded generator, then draw the frontier", "speedrl demo"),
}
"""Command -> what it does, and an example of its use."""


def _parser() -> argparse.ArgumentParser:
    program = "speedrl" if Path(sys.argv[0]).stem == "speedrl" else "python -m speedrl_lab"
    shape = argparse.RawDescriptionHelpFormatter
    parser = _OneLineParser(
        prog=program, formatter_class=shape,
        description="The workbench for Speed-RL: train masked image generators to need fewer steps, and look at it.",
        epilog=f"Results land below {outputs_root()} (environment variable SPEEDRL_OUTPUTS).\n"
        f"First steps: {program} list; then {program} run 01.\nMore about a command: {program} run --help",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_OneLineParser)
    parsers = {}
    for name, (text, example) in COMMANDS.items():
        shown = f"example:\n  {example.replace('speedrl ', f'{program} ')}" if example else ""
        parsers[name] = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=shown, formatter_class=shape
        )
    for name in ("params", "run", "sweep"):
        parsers[name].add_argument("notebook", help=NOTEBOOK)
    for name in ("run", "train"):
        parsers[name].add_argument("knobs", nargs="*", metavar="knob=value", help="values are Python literals or words")
    sweep, runs, report = (parsers[name] for name in ("sweep", "runs", "report"))
    sweep.add_argument("knobs", nargs="*", metavar="knob=a,b,...", help="one value is the same in all trials")
    sweep.add_argument("--name", help="folder below outputs/; the name of an earlier sweep goes on with it")
    sweep.add_argument("--workers", type=int, help="trials at a time (default: 2; on Ray as many as fit)")
    sweep.add_argument(
        "--backend", choices=("local", "ray"), default="local",
        help="processes of this machine, or the Ray cluster at RAY_ADDRESS or on this machine (default: local)",
    )  # fmt: skip
    sweep.add_argument("--cpus", type=int, help="threads of a trial (default: its share of the cores; on Ray 1)")
    sweep.add_argument("--gpus", type=float, default=0.0, help="GPUs of a trial, on Ray; 0.5 puts two on one GPU")
    for command in (runs, report):
        command.add_argument("places", nargs="*", metavar="run", help=RUNS)
    runs.add_argument(
        "--filter", nargs="+", default=[], metavar="word",
        help="setting=value, or a part of the run's name, method or card; all words must hold",
    )  # fmt: skip
    runs.add_argument("--delete", metavar="NAME", help="move one run to outputs/.trash; it can be moved back")
    runs.add_argument("--force", action="store_true", help="delete even a run that changed in the last minutes")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page to write, which must not exist yet")
    for name in ("run", "demo"):
        parsers[name].add_argument("--output", type=Path, metavar="FOLDER", help="where to write")
    return parser


if __name__ == "__main__":
    main()
