"""Our sampling loop beside the same loop written plainly: the same generator, in turns, in one process.

    python benchmarks/sampling.py --generator emoji --batch 1 16 64 --steps 1 4 16
    python benchmarks/sampling.py --generator emoji --batch 1 16 64 --steps 1 4 16 --guidance 1 2 --compiled
    python benchmarks/sampling.py --generator amused-256 --batch 4 --group 4 --steps 4 --guidance 1 --repeats 2

`--group` is the number of samples of each prompt. With `--compiled` ours runs by torch.compile, the plain loop as
before; the first calls, which compile, are not timed. Prints medians, the ratio plain / ours (above 1 ours is faster),
floating-point operations of both, and what share of the machine's best product ours reaches. Published sizes have
random weights. Peak memory is of one line a process on a CPU, where it only grows: give one line then.
"""

import argparse

import torch
from measure import CLOCKS, EMBEDDED, SIZES, flops, full_size, in_turns, peak_flops, peak_megabytes, prompts_of
from plain_loop import sample_plainly

from speedrl_lab.config import SamplerConfig
from speedrl_lab.generators import load_generator
from speedrl_lab.sampler import sample

HEADER = "generator,batch,group,steps,guidance,ours s,plain s,ratio,ours GF,plain GF,GF/s,of peak,peak MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", choices=SIZES, default="emoji")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--group", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--order", choices=("confidence", "halton", "random"), default="confidence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    if options.compiled and options.generator not in EMBEDDED:
        parser.error(f"--compiled: {options.generator} has no compiled form; of {', '.join(EMBEDDED)}")
    generator = full_size(options.generator)
    ours = load_generator(options.generator, str(generator.device), compiled=True) if options.compiled else generator
    device, dtype = generator.device, next(generator.policy.parameters()).dtype
    peak = peak_flops(device, dtype, options.clock)
    threads = torch.get_num_threads()
    print(f"{device}, {dtype}, {threads} threads, {options.clock} time, best product {peak / 1e9:.0f} GF/s")
    print("|", " | ".join(HEADER.split(",")), "|\n|", "---|" * len(HEADER.split(",")), sep="")
    for batch in options.batch:
        for steps in options.steps:
            for scale in options.guidance:
                print(line(ours, generator, options, batch, steps, scale, peak), flush=True)


def line(ours, generator, options: argparse.Namespace, batch: int, steps: int, scale: float, peak: float) -> str:
    """One row of the table."""
    group = min(options.group, batch)
    prompts = prompts_of(generator, batch, group)
    config = SamplerConfig(steps=steps, order=options.order, guidance_scale=scale)
    actions = {
        "ours": lambda: sample(ours, prompts, config),
        "plain": lambda: sample_plainly(generator, prompts, steps, scale),
    }
    memory = peak_megabytes(actions["ours"], generator.device)
    took = in_turns(actions, options.repeats, generator.device, options.clock)
    actions["ours"] = lambda: sample(generator, prompts, config)  # the counter does not see what is compiled
    work = {name: flops(action) for name, action in actions.items()}
    rate = work["ours"] / took["ours"]
    numbers = (
        f"{took['ours']:.4f}", f"{took['plain']:.4f}", f"{took['plain'] / took['ours']:.2f}",
        f"{work['ours'] / 1e9:.1f}", f"{work['plain'] / 1e9:.1f}", f"{rate / 1e9:.0f}", f"{rate / peak:.0%}",
        f"{memory:.0f}",
    )  # fmt: skip
    return " | ".join(["| " + options.generator, str(batch), str(group), str(steps), f"{scale:g}", *numbers]) + " |"


if __name__ == "__main__":
    main()
