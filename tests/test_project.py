"""What holds for the project as a whole: dependencies, direction of imports, knobs, notebooks."""

import ast
import re
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Literal, get_args, get_origin

import nbformat
import pytest
import yaml

from speedrl_lab.config import flat_fields
from speedrl_lab.notebooks import parameters

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "speedrl_lab"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONFIG = "speedrl_lab.config"

# Imports go to the same or a lower layer; a package's files share the layer of its name.
LAYERS = [
    "config presets scenes prompts compositor canvas schedules trajectory advantage objective networks noise "
    "pace guard precision steering parallel compilation allocator",
    "weights generator average draws adapters events runs judges distances intervals cache plots frontier_plots "
    "standings estimator_plots page",
    "generators rewards sampler parity pretrain controls board_plots board widgets notebooks comparison trash "
    "report browser",
    "likelihood footprint planner enumeration lookup bakeoff loss learner student matching sdtt dimo revising evaluate "
    "judge_check search contenders gallery tradeoff films microscope",
    "selftest rl reward_table distill examples whatif whatif_plots explorer frontier_explorer",
    "demo sweep training ray_backend trial api __main__",
]
LAYER = {name: depth for depth, names in enumerate(LAYERS) for name in names.split()}


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
INNER = [name for name in MODULES if name != "speedrl_lab"]


def _imports(name: str, inside_functions: bool = True) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: count from the package this module lies in
                package = name.split(".") if MODULES[name].stem == "__init__" else name.split(".")[:-1]
                base = ".".join(package[: len(package) - node.level + 1] + ([base] if base else []))
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else base for module in inner}
    return {module for module in found if module.split(".")[0] == "speedrl_lab"}


def _layer(module: str) -> int:
    name = module.split(".")[1]
    assert name in LAYER, f"{module} has no layer: give it one in tests/test_project.py"
    return LAYER[name]


def test_environment_file_repeats_the_dependencies():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, listed = environment["dependencies"]
    assert python == f"python{project['requires-python']}" and pip == "pip"
    assert listed == {"pip": [*project["dependencies"], "-e .[test]"]}


@pytest.mark.parametrize("name", INNER)
def test_imports_only_go_down(name):
    for target in _imports(name):
        assert target != "speedrl_lab", f"{name} imports from the package root"
        assert _layer(target) <= _layer(name), f"{name} imports {target}, which lies above it"


def test_imports_have_no_cycle():
    """A package may import its own files inside a function; what runs at import has no cycle."""
    graph = {name: _imports(name, inside_functions=False) for name in INNER}
    assert set(TopologicalSorter(graph).static_order()) >= set(INNER)  # raises CycleError


def _code(path: Path, parameters_cell: bool = False) -> list[str]:
    """Sources of a notebook's code cells: those tagged `parameters`, or all others."""
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    return [c.source for c in cells if ("parameters" in c.metadata.get("tags", [])) == parameters_cell]


def _loaded(sources: list[str], kind: type[ast.Name] | type[ast.Attribute]) -> set[str]:
    """Names, or attributes, whose value the sources take."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, kind)]
    field = "id" if kind is ast.Name else "attr"
    return {getattr(node, field) for node in nodes if isinstance(node.ctx, ast.Load)}


def test_every_config_field_is_read_outside_config():
    sources = [path.read_text() for name, path in MODULES.items() if name != CONFIG]
    sources += [source for path in NOTEBOOKS for source in _code(path)]
    assert set(flat_fields()) - _loaded(sources, ast.Attribute) == set()


def test_no_machine_paths():
    folders = [ROOT / name for name in ("speedrl_lab", "tests", "notebooks", "data", ".ci")]
    paths = [*ROOT.glob("*"), ROOT / "outputs" / "README.md", *(p for f in folders for p in f.rglob("*"))]
    text = {".py", ".md", ".toml", ".yml", ".json", ".ipynb", ".txt", ""}
    pattern = re.compile(r"/(work|root|tmp|home|Users)/")
    hits = [path for path in paths if path.is_file() and path.suffix in text
            if pattern.search(path.read_text())]  # fmt: skip
    assert hits == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_holds_only_the_story(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        assert cell.outputs == [] and cell.execution_count is None, "clear the outputs before a commit"
        most = 48 if "parameters" in cell.metadata.get("tags", []) else 20
        assert len(cell.source.splitlines()) <= most, f"move logic to the library:\n{cell.source}"
        assert not re.search(r"^\s*[!%]", cell.source, re.MULTILINE), f"shell or magic line:\n{cell.source}"
        kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef}, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_parameters_are_typed_and_used(path):
    (source,) = _code(path, parameters_cell=True)
    table = parameters(path)
    assigned = [node.target.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AnnAssign)]
    assert list(table) == assigned, "papermill cannot see each line as `name: type = literal  # help`"
    assert set(table) <= _loaded(_code(path), ast.Name), "a parameter that no later cell uses"
    for name in table.keys() & flat_fields().keys():
        annotated = table[name].type.partition("[")[0]
        assert annotated == _annotation(flat_fields()[name][1]), f"{name} is annotated {table[name].type}"


def _annotation(kind: object) -> str:
    """The type that a config field has in a parameters cell."""
    if get_origin(kind) is Literal:
        kind = type(get_args(kind)[0])
    origin = get_origin(kind)
    return kind.__name__ if origin is None else "list" if origin is tuple else "dict"
