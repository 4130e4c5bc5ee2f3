"""Our sampling loop beside diffusers' own aMUSEd pipeline: the same full-size network, random weights, one process.

    python benchmarks/amused_sampling.py --steps 2 --batch 1 --repeats 3
    python benchmarks/amused_sampling.py --steps 4 --batch 4 --group 4 --guidance 1

Prints single turns, medians, and the ratio diffusers / ours; above 1 ours is faster. `--group` is the number of
samples of each prompt. Only the loop is timed: captions are encoded before, nothing is decoded. The pipeline draws
from one generator, ours from one a sample, so that the pictures differ; with its generator we give its tokens, see
tests/test_amused.py.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import torch
from measure import CLOCKS, flops, full_size, prompts_of, seconds

from speedrl_lab.config import SamplerConfig
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.sampler import sample


def pipeline_of(generator: MaskedGenerator) -> Any:
    """diffusers' pipeline around the network of `generator`, with a codec that is never asked."""
    from diffusers import AmusedPipeline, AmusedScheduler, VQModel

    codec = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 5, up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(32,) * 5, layers_per_block=1, latent_channels=8, num_vq_embeddings=8, norm_num_groups=8,
    )  # fmt: skip
    scheduler = AmusedScheduler(mask_token_id=generator.spec.mask_id, masking_schedule="cosine")
    pipe = AmusedPipeline(
        vqvae=codec, tokenizer=None, text_encoder=None, transformer=generator.policy, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(generator.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, choices=(256, 512), default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--group", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 10.0])
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    ours = full_size(f"amused-{options.pixels}")
    theirs, device, dtype = pipeline_of(ours), ours.device, ours.policy.dtype
    prompts = prompts_of(ours, options.batch, options.group)
    cond, null = (one.tensors for one in (ours.encode(prompts), ours.null(options.batch)))
    given = {
        "prompt_embeds": cond["pooled"].to(dtype), "encoder_hidden_states": cond["text"].to(dtype),
        "negative_prompt_embeds": null["pooled"].to(dtype), "negative_encoder_hidden_states": null["text"].to(dtype),
        "num_inference_steps": options.steps, "height": options.pixels, "width": options.pixels,
        "output_type": "latent",
    }  # fmt: skip

    def run_ours(scale: float) -> None:
        config = SamplerConfig(steps=options.steps, order="confidence", guidance_scale=scale, choice_temperature=2.0)
        sample(ours, prompts, config)

    @torch.no_grad()
    def run_theirs(scale: float) -> None:
        theirs(**given, guidance_scale=scale, generator=torch.Generator().manual_seed(0))

    threads = torch.get_num_threads()
    print(f"{device}, {dtype}, {threads} threads, {options.clock} time, {options.pixels} pixels, "
          f"{options.steps} steps, batch {options.batch} of {len(set(prompts))} prompts")  # fmt: skip
    for scale in options.guidance:
        work = [flops(partial(run, scale)) / 1e9 for run in (run_ours, run_theirs)]  # warm-up
        turns = [
            [seconds(partial(run, scale), device, options.clock) for run in (run_ours, run_theirs)]
            for _ in range(options.repeats)
        ]
        mine, others = (statistics.median(column) for column in zip(*turns, strict=True))
        listed = "; ".join(f"{left:.2f} {right:.2f}" for left, right in turns)
        print(f"guidance {scale:g}: ours {mine:.2f} s, diffusers {others:.2f} s, ratio {others / mine:.2f}; "
              f"{work[0]:.0f} and {work[1]:.0f} GF, ratio {work[1] / work[0]:.2f}  ({listed})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
