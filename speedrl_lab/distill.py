"""Distillation, the rival of Speed-RL: the same call, records, checkpoints and weights file as `rl.train`.

All methods need prompts and the generator alone, no pictures: states are made from samples of the
teacher (`sdtt`, `revise`) or of the student itself (`dimo`). Costs are counted as in `rl`: forward passes of any of
the networks involved, and as `passes` with every backward pass as two forward ones.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from speedrl_lab.adapters import require_whole
from speedrl_lab.average import Average
from speedrl_lab.config import VARYING, DistillConfig, SamplerConfig
from speedrl_lab.dimo import TokenMatching
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.revising import Revising
from speedrl_lab.runs import Run
from speedrl_lab.sdtt import MultiStepMatching

SAVE_EVERY = 50
WARM_UP = 20


def distill(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    config: DistillConfig,
    sampler: SamplerConfig,
    run: Run | None = None,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Turn `generator` in place into a student of what it was, and yield one record an iteration.

    `sampler` says how the student will be drawn: order, power, start_noise; its steps, guidance and
    temperature play no part. `revise` also draws the teacher's samples with its schedule and power. Stop by
    leaving the loop; with a `run`, call again to go on, bit for bit on a CPU. Raises ValueError before any work
    for settings that cannot be met.
    """
    check(generator, prompts, config, sampler)
    kinds = {"sdtt": MultiStepMatching, "dimo": TokenMatching, "revise": Revising}
    method = kinds[config.method](generator, prompts, config, sampler, seed)
    average = Average(generator.policy, config.distill_ema)
    iteration = 0

    def state() -> dict[str, Any]:
        return {"iteration": iteration, "method": method.state(), "average": average.state_dict()}

    if run is not None:
        saved = run.load_checkpoint()
        if saved is None:
            run.save_checkpoint(state())  # a second call knows the teacher
        else:
            iteration = saved["iteration"]
            method.restore(saved["method"])
            average.load_state_dict(saved["average"])
    while iteration < config.distill_iterations:
        began = time.perf_counter()
        rate = min((iteration + 1) / WARM_UP, 1 - iteration / config.distill_iterations)
        measured = method.update(iteration, rate)
        average.update(generator.policy)
        iteration += 1
        record = {
            "iteration": iteration,
            **measured,
            "passes": measured["forwards"] + 2 * measured["backwards"],
            "learning_rate": config.distill_learning_rate * rate,
            "seconds": time.perf_counter() - began,
        }
        if run is not None:
            run.log(record)
            if iteration == config.distill_iterations or iteration % SAVE_EVERY == 0:
                run.save_checkpoint(state())
        yield record
    average.copy_to(generator.policy)
    if config.method == "revise":
        generator.revises = True
    if run is not None:
        origin = f"{config.method} run {run.path.name}"
        generator.save_policy(run.path / "policy.safetensors", origin=origin)


def check(generator: MaskedGenerator, prompts: Sequence[str], config: DistillConfig, sampler: SamplerConfig) -> None:
    """Raise ValueError in one line for what would fail later."""
    num_tokens = generator.spec.num_tokens
    if not prompts:
        raise ValueError("no training prompts given; expected at least one")
    if sampler.order == "confidence":
        raise ValueError("order='confidence' depends on the model; distil with order='halton' or 'random'")
    if sampler.schedule in VARYING:
        raise ValueError(f"schedule={sampler.schedule!r} has no fixed counts; distil with schedule='power'")
    name = "student_steps" if config.method == "dimo" else "teacher_steps"
    most = max(config.student_steps) if config.method == "dimo" else config.teacher_steps
    if most > num_tokens:
        raise ValueError(f"{name}={getattr(config, name)}: expected at most {num_tokens} steps, one a token")
    require_whole(generator.policy)
    generator.encode(list(prompts))  # an unreadable prompt fails here
