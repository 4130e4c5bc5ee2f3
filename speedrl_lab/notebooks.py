"""Run a notebook as a batch job: strict parameters in, an executed copy out.

Everything that can be wrong with a knob or a folder is said in one line before a kernel starts.
papermill alone only warns about an unknown parameter and takes `false` for a (true) string.
Left out on purpose: sweeps, and going on with a failed notebook (a run's checkpoint does that).
papermill is imported inside functions, because it imports this module to find `LabEngine`, and because the command
line starts with this module: nbformat's schema alone takes longer to load than most commands take to run.
"""

import ast
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from speedrl_lab.config import RunConfig, SamplerConfig, flat_fields, nearest
from speedrl_lab.runs import outputs_root

if TYPE_CHECKING:
    import nbformat

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


class Parameter(NamedTuple):
    """One line of a notebook's parameters cell: `name: type = default  # help`."""

    type: str
    default: Any
    help: str


class NotebookError(RuntimeError):
    """A cell failed; the message names the error and the partly executed notebook."""


class LabEngine:
    """papermill engine `speedrl`: no unknown parameters, quiet kernels and small output notebooks.

    Stored widget state would add about 5 MB for each plotly FigureWidget.
    """

    @classmethod
    def execute_notebook(cls, notebook: "nbformat.NotebookNode", kernel_name: str, **settings: Any) -> Any:
        """Forward to papermill's own engine; called by papermill. Raises TypeError for an unknown parameter."""
        from papermill.engines import NBClientEngine

        _refuse_unknown(notebook)
        settings = {
            "store_widget_state": False,
            "coalesce_streams": True,  # else every print of a cell is an output of its own
            "extra_arguments": ["--IPKernelApp.log_level=40"],  # errors only
            **settings,
        }
        return NBClientEngine.execute_notebook(notebook, kernel_name, **settings)

    @classmethod
    def nb_kernel_name(cls, notebook: "nbformat.NotebookNode", name: str | None = None) -> str:
        """The kernel the notebook asks for; called by papermill."""
        from papermill.utils import nb_kernel_name

        return nb_kernel_name(notebook, name)

    @classmethod
    def nb_language(cls, notebook: "nbformat.NotebookNode", language: str | None = None) -> str:
        """The notebook's language; called by papermill."""
        from papermill.utils import nb_language

        return nb_language(notebook, language)


def questions() -> dict[str, str]:
    """Every notebook of the project with the question (`> ...`) of its first markdown cell."""
    return {path.stem: _question(path) for path in sorted(NOTEBOOKS.glob("*.ipynb"))}


def notebook_path(name: str | Path) -> Path:
    """The notebook called "03_speed_rl" or "03", or at a path that ends in .ipynb.

    Raises FileNotFoundError that names the nearest notebook.
    """
    path = Path(name)
    known = {path.stem: path for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    if path.suffix == ".ipynb" and path.is_file():
        return path
    matches = [known[stem] for stem in known if stem == str(name) or stem.split("_")[0] == str(name)]
    if len(matches) != 1:
        raise FileNotFoundError(_unknown("notebook", path.stem, known))
    return matches[0]


def parameters(name: str | Path) -> dict[str, Parameter]:
    """Names, types, defaults and help of the cell tagged `parameters`.

    Raises ValueError where a default is not a literal.
    """
    import papermill

    path = notebook_path(name)
    table = {}
    for key, row in papermill.inspect_notebook(path).items():
        try:
            default = ast.literal_eval(row["default"])
        except (ValueError, SyntaxError):
            raise ValueError(f"{path.name}: default of {key} is not a literal: {row['default']}") from None
        kind = row["inferred_type_name"].strip()
        kind = type(default).__name__ if kind == "None" else kind  # papermill's "None": not annotated
        table[key] = Parameter(kind, default, row["help"].strip())
    return table


def run(name: str | Path, /, output: Path | str | None = None, **knobs: Any) -> Path:
    """Execute a notebook and return its executed copy, `<output>/<notebook>.ipynb`.

    A preset (given here, or by the environment variable SPEEDRL_PRESET) sets every declared
    parameter that is a config field; explicit knobs come after it.

    Args:
        output: folder; `outputs/<notebook>/<UTC time>` where it is not given.

    Raises:
        TypeError: unknown or mistyped knob; names the nearest or expected one.
        ValueError: a value or a preset that no configuration allows.
        FileExistsError: the executed notebook is already there.
        OSError: the folder cannot be written.
        NotebookError: a cell failed.
    """
    path = notebook_path(name)
    values = resolved(path, knobs)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    folder = Path(output) if output is not None else outputs_root() / path.stem / stamp
    target = folder / path.name
    if target.exists():
        raise FileExistsError(f"{target} exists and is not overwritten; choose another output folder")
    _require_writable(folder)
    _execute(path, target, values)
    return target


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split `name=value`; the value is a Python literal, or a bare word taken as a string."""
    name, equals, raw = (part.strip() for part in text.partition("="))
    if not (equals and raw and name.isidentifier()):
        raise ValueError(f"{text!r}: expected name=value")
    python = {"true": "True", "false": "False", "none": "None", "null": "None"}.get(raw.lower(), raw)
    if python != raw:
        raise ValueError(f"{text!r}: write {name}={python}")
    try:
        return name, ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        if raw[0] in "[({'\"":
            raise ValueError(f"{text!r}: the value is not a complete Python literal") from None
        return name, raw


def resolved(path: Path, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The values to inject: the preset's, then the knobs; checked as far as possible without a kernel.

    Raises TypeError or ValueError as `run` does.
    """
    declared = parameters(path)
    for name, value in knobs.items():
        if name not in declared:
            raise TypeError(_unknown("parameter", name, declared))
        kind, default, _ = declared[name]
        if not (_fits(value, kind) or (value is None and default is None)):
            given = type(value).__name__
            raise TypeError(f"parameter {name}={value!r} has type {given}, expected {kind}")
    values: dict[str, Any] = {}
    preset = knobs.get("preset") or os.environ.get("SPEEDRL_PRESET")
    if preset:
        flat = RunConfig.from_flat(preset).flat()
        values = {name: flat[name] for name in declared if name in flat}
    values |= knobs
    _check_config({name: values.get(name, row.default) for name, row in declared.items()})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_config(values: Mapping[str, Any]) -> None:
    """Raise what the configuration raises for those values that are config fields.

    The sampler's fields are checked by themselves: a notebook that only samples may use an order
    or a guidance scale with which the training loop would refuse to run.
    """
    owners = flat_fields()
    given = {name: value for name, value in values.items() if name in owners and value is not None}
    sampler = {name: given.pop(name) for name in list(given) if owners[name][0] is SamplerConfig}
    RunConfig.from_flat(**given)
    SamplerConfig(**sampler)


def _fits(value: Any, kind: str) -> bool:
    """Whether a value has an annotated type such as "float" or "list[int]"."""
    base, _, inner = kind.rstrip("]").partition("[")
    match base:
        case "float":
            return type(value) in (int, float)
        case "int" | "str" | "bool":
            return type(value).__name__ == base
        case "list":
            return isinstance(value, list | tuple) and all(_fits(item, inner) for item in value if inner)
        case "dict":
            return isinstance(value, Mapping)
    raise ValueError(f"parameter type {kind!r}: expected int, float, str, bool, list, list[...] or dict")


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}; choose another output folder") from None


def _execute(path: Path, target: Path, values: Mapping[str, Any]) -> None:
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.engines import papermill_engines

    papermill_engines.register("speedrl", LabEngine)  # also where the package is not installed
    print(f"{path.stem} -> {target}")
    try:
        papermill.execute_notebook(path, target, parameters=dict(values), engine_name="speedrl", stdout_file=sys.stdout)
    except papermill.PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        raise NotebookError(
            f"{path.stem} failed in cell [{error.exec_count}]: {reason}; executed so far: {target}"
        ) from None
    except DeadKernelError:
        raise NotebookError(
            f"{path.stem}: the kernel died, perhaps for want of memory; executed so far: {target}"
        ) from None


def _refuse_unknown(notebook: "nbformat.NotebookNode") -> None:
    """Raise TypeError where papermill was given a parameter that the notebook does not declare."""
    declared = [
        node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id
        for cell in notebook.cells
        if "parameters" in cell.metadata.get("tags", [])
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.AnnAssign | ast.Assign)
    ]
    for name in notebook.metadata.get("papermill", {}).get("parameters", {}):
        if name not in declared:
            raise TypeError(_unknown("parameter", name, declared))


def _question(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    first = next(("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"), "")
    match = re.search(r"^> *(.+)", first, re.MULTILINE) or re.search(r"^#+ *(.+)", first, re.MULTILINE)
    return match[1].strip() if match else ""


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    known = list(known)
    if not known:
        return f"unknown {what} {name!r}: there are none here"
    return f"unknown {what} {name!r}; nearest: {nearest(name, known)!r} (one of {', '.join(known)})"
