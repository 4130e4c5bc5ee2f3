"""speedrl_lab: the workbench for Speed-RL (arXiv 2512.01094).

    import speedrl_lab as lab
    generator = lab.load_generator("emoji")
    trajectory = lab.sample(generator, ["two dogs on a red background"], lab.SamplerConfig(steps=4))
    images = generator.decode(trajectory.tokens)  # (B, 3, H, W) in [0, 1]

These names are the whole public surface; `lab.plots` and `lab.widgets` draw what they return.
"""

from speedrl_lab import plots, schedules, widgets
from speedrl_lab.config import DistillConfig, EvalConfig, PretrainConfig, RunConfig, SamplerConfig, TrainConfig
from speedrl_lab.distill import distill
from speedrl_lab.evaluate import evaluate, score_samples, summarize
from speedrl_lab.generators import load_generator
from speedrl_lab.intervals import frontier, passes_at_quality, passes_to_reach
from speedrl_lab.likelihood import trajectory_log_prob
from speedrl_lab.prompts import load_prompts
from speedrl_lab.rewards import build_rewards
from speedrl_lab.rl import train
from speedrl_lab.runs import Run
from speedrl_lab.sampler import sample
from speedrl_lab.search import load_base_samplers, load_base_samplers_by_passes, search_samplers
from speedrl_lab.selftest import selftest
from speedrl_lab.trajectory import Trajectory

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
