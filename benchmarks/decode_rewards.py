"""What stands beside the loop: seconds an image of sampling, decoding and each reward.

    python benchmarks/decode_rewards.py --generator emoji --batch 1 16 64
    python benchmarks/decode_rewards.py --generator amused-256 --batch 1 --steps 1 --repeats 1

Rewards are the embedded ones and those named by `--rewards`; published sizes have no reward without weights.
"""

import argparse

import torch
from measure import CLOCKS, EMBEDDED, SIZES, full_size, in_turns, prompts_of

from speedrl_lab.config import SamplerConfig
from speedrl_lab.rewards import build_rewards
from speedrl_lab.sampler import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", choices=SIZES, default="emoji")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rewards", nargs="*", default=["clip", "detector", "coherence", "novelty"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args()
    generator = full_size(options.generator)
    rewards = build_rewards(options.rewards) if options.generator in EMBEDDED else {}
    device, config = generator.device, SamplerConfig(steps=options.steps)
    print(f"{device}, {torch.get_num_threads()} threads, {options.clock} time, {options.steps} steps, ms an image")
    print("| generator | batch | loop | decode |", "".join(f" {name} |" for name in rewards), sep="")
    print("|---|---|---|---|", "---|" * len(rewards), sep="")
    for batch in options.batch:
        prompts = prompts_of(generator, batch, 1)
        trajectory = sample(generator, prompts, config)
        images = generator.decode(trajectory.tokens)
        actions = {
            "loop": lambda prompts=prompts: sample(generator, prompts, config),
            "decode": lambda trajectory=trajectory: generator.decode(trajectory.tokens),
            **{
                name: lambda reward=reward, given=(images, prompts, trajectory): reward(*given)
                for name, reward in rewards.items()
            },
        }
        took = in_turns(actions, options.repeats, device, options.clock)
        cells = [f"{1000 * value / batch:.3g}" for value in took.values()]
        print(f"| {options.generator} | {batch} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
