"""What `import speedrl_lab as lab` offers beside its modules; loaded when one of these names is first used."""

# ruff: noqa: F401

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
