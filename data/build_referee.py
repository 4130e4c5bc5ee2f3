"""Train the referee: the detector behind the reward `verified`, apart from the two that judge.

    python data/build_referee.py        # about 4 minutes on one core

Smaller than the judges, with another order of the data and both augmentations; it sees real scenes alone.
"""

import torch
from tqdm import tqdm

from speedrl_lab import judges, networks, pretrain, scenes
from speedrl_lab.generators.emoji import WEIGHTS
from speedrl_lab.runs import outputs_root
from speedrl_lab.weights import save_weights

ITERATIONS, BATCH, SEED = 1500, 128, 60_000_000


def augment(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """What both judges were hardened against."""
    return pretrain.displace(pretrain.degrade(images, rng), rng)


def main() -> None:
    with torch.random.fork_rng():  # constructors draw from the global generator
        torch.manual_seed(SEED)
        referee = networks.Detector(widths=(32, 64, 96), features=128)
    checkpoint = outputs_root() / "referee" / "referee.pt"
    device = torch.device("cpu")
    loop = pretrain.train_detector(referee, ITERATIONS, BATCH, checkpoint, device, SEED, augment)
    for record in (bar := tqdm(loop, total=ITERATIONS, desc="referee")):
        bar.set_postfix(accuracy=f"{record['accuracy']:.3f}")
    drawn, _, images = scenes.draw_batch(512, "validation", seed=SEED)
    verdict = judges.verdict(referee.eval(), images, [scene.caption for scene in drawn])
    print({name: f"{value.float().mean():.3f}" for name, value in verdict.items()})
    origin = f"build_referee.py: {ITERATIONS} x {BATCH} real scenes"
    save_weights(referee, WEIGHTS / "referee.safetensors", origin)


if __name__ == "__main__":
    main()
