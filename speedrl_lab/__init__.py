"""speedrl_lab: the workbench for Speed-RL (arXiv 2512.01094).

    import speedrl_lab as lab
    generator = lab.load_generator("emoji")
    trajectory = lab.sample(generator, ["two dogs on a red background"], lab.SamplerConfig(steps=4))
    images = generator.decode(trajectory.tokens)  # (B, 3, H, W) in [0, 1]

These names are the whole public surface; `lab.plots` and `lab.widgets` draw what they return. Nothing is loaded before
a name is used: PyTorch with the first function, Matplotlib, Plotly and ipywidgets with `lab.plots` and `lab.widgets`.
"""

# ruff: noqa: F403, F405

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which do not call __getattr__
    from speedrl_lab import plots, schedules, widgets
    from speedrl_lab.api import *

__all__ = [
    "DistillConfig",
    "EvalConfig",
    "PretrainConfig",
    "Run",
    "RunConfig",
    "SamplerConfig",
    "TrainConfig",
    "Trajectory",
    "build_rewards",
    "distill",
    "evaluate",
    "frontier",
    "load_base_samplers",
    "load_base_samplers_by_passes",
    "load_generator",
    "load_prompts",
    "passes_at_quality",
    "passes_to_reach",
    "plots",
    "sample",
    "schedules",
    "score_samples",
    "search_samplers",
    "selftest",
    "summarize",
    "train",
    "trajectory_log_prob",
    "widgets",
]

_MODULES = ("plots", "schedules", "widgets")


class _Package(ModuleType):
    """A package whose functions `distill`, `evaluate` and `selftest` are not replaced by the modules they lie in."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Called by the import system, too, whenever a submodule has been loaded."""
        if name in _MODULES or name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used; AttributeError for any other."""
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    found = getattr(import_module(f"{__name__}.api"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
