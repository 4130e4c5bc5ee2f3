"""Average the two stages of Speed-RL into the committed policy, or measure the curve between them.

    python data/build_speed_rl.py 0.5      # writes data/weights/speed_rl.safetensors
    python data/build_speed_rl.py curve    # prints quality and diversity for five shares, about 5 minutes

Stage 1 was tuned with novelty weight 0.4, stage 2 went on from it with 1.0; the number is the share of stage 2.
"""

import sys
from pathlib import Path

import speedrl_lab as lab
from speedrl_lab.average import interpolate
from speedrl_lab.generator import MaskedGenerator

WEIGHTS = Path(__file__).parent / "weights"
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def between(share: float) -> MaskedGenerator:
    """The policy that lies this share of the way from stage 1 to stage 2."""
    mixed, other = (lab.load_generator(policy=WEIGHTS / f"speed_rl_stage{stage}.safetensors") for stage in (1, 2))
    interpolate(mixed.policy, other.policy, share)
    interpolate(mixed.pace, other.pace, share)
    return mixed


def curve() -> None:
    """Each policy at its own pace beside the usual base, on 64 test prompts with three seeds."""
    models = {f"{share:g}": between(share) for share in SHARES}
    own = lab.SamplerConfig(schedule="paced", greedy_pace=True)
    usual = {"usual": lab.SamplerConfig(order="confidence", guidance_scale=3.0)}
    prompts = lab.load_prompts("test", 64)
    paced = lab.score_samples(models, prompts, [8], 3, dict.fromkeys(models, own))
    base = lab.score_samples({"usual": lab.load_generator()}, prompts, [16], 3, usual)
    for frame in (paced, base):
        columns = [name for name in lab.frontier(frame) if not name.startswith(("color", "relation", "fd", "seconds"))]
        print(lab.frontier(frame)[columns].round(3).to_string(index=False))


if __name__ == "__main__":
    if sys.argv[1:] == ["curve"]:
        curve()
    else:
        share = float(sys.argv[1])
        origin = f"data/build_speed_rl.py {share:g}: stages 1 and 2 averaged; see speed_rl.md"
        between(share).save_policy(WEIGHTS / "speed_rl.safetensors", origin=origin)
