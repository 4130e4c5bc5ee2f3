"""Our sampling loop beside diffusers' own aMUSEd pipeline: the same full-size network, random weights, one process.

    python benchmarks/amused_sampling.py --steps 2 --batch 1 --repeats 3

Prints seconds of each repeat (they take turns), medians, and the ratio diffusers / ours; above 1 ours is faster.
Only the loop is timed: captions are encoded before, nothing is decoded. The pipeline draws from one generator, ours
from one a sample, so that the pictures differ; with its generator we give its tokens, see tests/test_amused.py.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from speedrl_lab.config import SamplerConfig
from speedrl_lab.generator import GeneratorSpec
from speedrl_lab.generators.amused import AmusedGenerator
from speedrl_lab.generators.blank import AMUSED
from speedrl_lab.sampler import sample

PROMPT, WORDS, WIDTH = "a prompt", 77, 768
SIDES = {256: 16, 512: 32}


class Encoded(AmusedGenerator):
    """aMUSEd with conditions that are there already."""

    def __init__(self, spec: GeneratorSpec, network: torch.nn.Module, states: dict[str, dict[str, torch.Tensor]]):
        nothing = torch.nn.Identity()
        super().__init__(spec, network, nothing, None, nothing)
        self._encoded.update(states)


def full_size(pixels: int, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    from diffusers import UVit2DModel

    large = pixels == 512
    torch.manual_seed(0)
    with torch.device(device):
        network = UVit2DModel(**AMUSED, downsample=large, upsample=large, sample_size=SIDES[pixels])
    return network.to(dtype).eval()


def pipeline_of(network: torch.nn.Module, device: torch.device) -> "torch.nn.Module":
    from diffusers import AmusedPipeline, AmusedScheduler, VQModel

    codec = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 5, up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=(32,) * 5, layers_per_block=1, latent_channels=8, num_vq_embeddings=8, norm_num_groups=8,
    )  # fmt: skip
    scheduler = AmusedScheduler(mask_token_id=8255, masking_schedule="cosine")
    pipe = AmusedPipeline(vqvae=codec, tokenizer=None, text_encoder=None, transformer=network, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, choices=SIDES, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 10.0])
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    network = full_size(options.pixels, device, dtype)
    rng = torch.Generator().manual_seed(0)
    text, pooled = torch.randn(WORDS, WIDTH, generator=rng), torch.randn(WIDTH, generator=rng)
    side = SIDES[options.pixels]
    spec = GeneratorSpec("amused", (side, side), (options.pixels, options.pixels), 8192, 8255, "text", "none")
    ours = Encoded(spec, network, {PROMPT: {"text": text, "pooled": pooled}, "": {"text": -text, "pooled": -pooled}})
    theirs = pipeline_of(network, device)
    count = options.batch

    def run_ours(scale: float) -> None:
        sampler = SamplerConfig(steps=options.steps, order="confidence", guidance_scale=scale, choice_temperature=2.0)
        sample(ours, [PROMPT] * count, sampler)

    def run_theirs(scale: float) -> None:
        shown, sentence = text.expand(count, -1, -1).to(device, dtype), pooled.expand(count, -1).to(device, dtype)
        theirs(
            prompt_embeds=sentence, encoder_hidden_states=shown, negative_prompt_embeds=-sentence,
            negative_encoder_hidden_states=-shown, num_inference_steps=options.steps, guidance_scale=scale,
            height=options.pixels, width=options.pixels, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    def seconds(run: Callable[[float], None], scale: float) -> float:
        began = time.perf_counter()
        with torch.no_grad():
            run(scale)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    threads = torch.get_num_threads()
    print(f"{device}, {dtype}, {threads} threads, {options.pixels} pixels, {options.steps} steps, batch {count}")
    for scale in options.guidance:
        for run in (run_ours, run_theirs):  # warm-up
            seconds(run, scale)
        turns = [(seconds(run_ours, scale), seconds(run_theirs, scale)) for _ in range(options.repeats)]
        mine, others = (statistics.median(column) for column in zip(*turns, strict=True))
        listed = "; ".join(f"{left:.2f} {right:.2f}" for left, right in turns)
        print(f"guidance {scale:g}: ours {mine:.2f} s, diffusers {others:.2f} s, ratio {others / mine:.2f}  ({listed})")


if __name__ == "__main__":
    main()
