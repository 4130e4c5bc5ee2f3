"""Our sampling loop beside diffusers' own aMUSEd pipeline: the same full-size network, random weights, one process.

    python benchmarks/amused_sampling.py --steps 2 --batch 1 --repeats 3
    python benchmarks/amused_sampling.py --steps 4 --batch 4 --group 4 --guidance 1
    python benchmarks/amused_sampling.py --steps 4 --dtype bfloat16 --decode

Prints medians, the ratios diffusers / ours (above 1 ours is faster), operations of both, single turns. `--group` is
the number of samples of each prompt. In bfloat16 ours meets the pipeline twice, as it comes, which is float32, and
in bfloat16 as well. Captions are encoded before; nothing is decoded but with `--decode`. The pipeline draws from one
generator, ours from one a sample, so that the pictures differ; with its generator we give its tokens, see
tests/test_amused.py.
"""

import argparse
import statistics
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from measure import CLOCKS, flops, full_size, prompts_of, seconds

from speedrl_lab.config import SamplerConfig
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.sampler import sample

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pipeline_of(generator: MaskedGenerator, dtype: torch.dtype) -> Any:
    """diffusers' pipeline with copies of the networks of `generator`, in its own layout of memory."""
    from diffusers import AmusedPipeline, AmusedScheduler

    scheduler = AmusedScheduler(mask_token_id=generator.spec.mask_id, masking_schedule="cosine")
    network, codec = (deepcopy(part).to(dtype) for part in (generator.policy, generator.codec))
    codec.to(memory_format=torch.contiguous_format)
    pipe = AmusedPipeline(vqvae=codec, tokenizer=None, text_encoder=None, transformer=network, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(generator.device)


def ours(generator: MaskedGenerator, prompts: list[str], options: argparse.Namespace, scale: float) -> None:
    config = SamplerConfig(steps=options.steps, order="confidence", guidance_scale=scale, choice_temperature=2.0)
    drawn = sample(generator, prompts, config)
    if options.decode:
        generator.decode(drawn.tokens)


def theirs(
    pipe: Any, generator: MaskedGenerator, prompts: list[str], options: argparse.Namespace, scale: float
) -> None:
    cond, null = generator.encode(prompts).tensors, generator.null(len(prompts)).tensors
    dtype = pipe.transformer.dtype
    with torch.no_grad():
        pipe(
            prompt_embeds=cond["pooled"].to(dtype), encoder_hidden_states=cond["text"].to(dtype),
            negative_prompt_embeds=null["pooled"].to(dtype), negative_encoder_hidden_states=null["text"].to(dtype),
            num_inference_steps=options.steps, height=options.pixels, width=options.pixels, guidance_scale=scale,
            output_type="pt" if options.decode else "latent", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, choices=(256, 512), default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--group", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 10.0])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    generator = full_size(f"amused-{options.pixels}")
    generator.policy.float()
    pipes = {name: pipeline_of(generator, DTYPES[name]) for name in dict.fromkeys(("float32", options.dtype))}
    generator.policy.to(DTYPES[options.dtype])
    prompts, device = prompts_of(generator, options.batch, options.group), generator.device
    what = "pictures" if options.decode else "tokens"
    print(f"{device}, {torch.get_num_threads()} threads, {options.clock} time, {options.pixels} pixels, "
          f"{options.steps} steps to {what}, batch {options.batch} of {len(set(prompts))} prompts")  # fmt: skip
    for scale in options.guidance:
        runs = {f"ours {options.dtype}": partial(ours, generator, prompts, options, scale)}
        for name, pipe in pipes.items():
            runs[f"diffusers {name}"] = partial(theirs, pipe, generator, prompts, options, scale)
        print(f"guidance {scale:g}: {compared(runs, options, device)}", flush=True)


def compared(runs: dict[str, Callable[[], None]], options: argparse.Namespace, device: torch.device) -> str:
    """Medians of turns; ratios of all but the first to the first."""
    work = [flops(run) / 1e9 for run in runs.values()]  # warm-up
    turns = [[seconds(run, device, options.clock) for run in runs.values()] for _ in range(options.repeats)]
    mine, *others = (statistics.median(column) for column in zip(*turns, strict=True))
    first, *rest = runs
    parts = [f"{first} {mine:.2f} s"]
    parts += [f"{name} {took:.2f} s, ratio {took / mine:.2f}" for name, took in zip(rest, others, strict=True)]
    listed = "; ".join(" ".join(f"{took:.2f}" for took in turn) for turn in turns)
    return f"{', '.join(parts)}; {work[0]:.0f} and {work[1]:.0f} GF  ({listed})"


if __name__ == "__main__":
    main()
