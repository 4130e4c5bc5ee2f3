"""What starting loads: a slow library comes with the function that needs it, not with the package."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import speedrl_lab

PACKAGE = Path(speedrl_lab.__file__).parent
DRAWING = {"matplotlib", "plotly", "ipywidgets", "IPython", "torchvision", "torchmetrics"}
LARGE = {"diffusers", "transformers", "open_clip", "peft", "ray", "papermill", "nbformat", "scipy", "sklearn"}


def loaded_after(code: str) -> set[str]:
    """Top-level modules of a fresh Python in which the code has run."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    return set(json.loads(ended.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "left_out"),
    [
        ("import speedrl_lab", DRAWING | LARGE | {"torch", "numpy", "pandas", "PIL"}),
        ("import speedrl_lab as lab; lab.sample, lab.train, lab.evaluate, lab.schedules", DRAWING | LARGE),
        ("from speedrl_lab import *; sample", LARGE),
        ("from speedrl_lab.__main__ import main; main(['list'])", DRAWING | LARGE | {"torch", "pandas"}),
        ("from speedrl_lab.__main__ import main; main([])", DRAWING | LARGE),
        ("from speedrl_lab.__main__ import main; main(['params', '03'])", DRAWING | LARGE - {"papermill", "nbformat"}),
    ],
)
def test_slow_libraries_are_loaded_where_they_are_needed(code, left_out):
    loaded = loaded_after(code)
    assert "speedrl_lab" in loaded
    assert loaded & left_out == set()


def test_a_function_keeps_its_name_when_the_module_it_lies_in_is_loaded():
    loaded_after(
        "import speedrl_lab as lab\n"
        "import speedrl_lab.evaluate, speedrl_lab.selftest\n"  # before the functions were used
        "functions = lab.distill, lab.evaluate, lab.selftest\n"
        "import speedrl_lab.distill, speedrl_lab.evaluate\n"
        "assert all(callable(function) for function in functions)\n"
        "assert functions == (lab.distill, lab.evaluate, lab.selftest)"
    )


def test_every_public_name_is_found_and_listed():
    for name in speedrl_lab.__all__:
        assert getattr(speedrl_lab, name) is getattr(speedrl_lab, name)
    assert set(speedrl_lab.__all__) <= set(dir(speedrl_lab))
    with pytest.raises(AttributeError, match="has no attribute 'sampel'") as error:
        speedrl_lab.sampel  # noqa: B018
    assert error.value.name == "sampel"


def test_what_type_checkers_read_is_what_is_public():
    """They follow the imports of api.py and, in the package, those under TYPE_CHECKING."""
    found = {alias.name for node in ast.walk(ast.parse((PACKAGE / "api.py").read_text()))
             if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip
    modules = {"plots", "schedules", "widgets"}
    assert found | modules == set(speedrl_lab.__all__)
    assert f"from speedrl_lab import {', '.join(sorted(modules))}" in (PACKAGE / "__init__.py").read_text()
