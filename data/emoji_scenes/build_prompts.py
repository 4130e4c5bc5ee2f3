"""Write the prompts files of EmojiScenes: 256 different captions a split (1024 for training).

    python data/emoji_scenes/build_prompts.py

Kinds are as equal as the split allows: the held-out splits have few one-object captions.
"""

from pathlib import Path

import torch

from speedrl_lab import scenes

SIZES = {"train": 1024, "validation": 256, "test": 256, "composition": 256}


def main() -> None:
    for number, (split, size) in enumerate(SIZES.items()):
        rng = torch.Generator().manual_seed(number)
        chosen: dict[str, None] = {}
        quota = -(-size // len(scenes.KINDS))
        counts = dict.fromkeys(scenes.KINDS, 0)
        pools = dict.fromkeys(scenes.KINDS, 0)
        for scene in scenes.all_scenes():
            pools[scene.kind] += scenes.split_of(scene) == split
        short = sum(max(0, quota - pool) for pool in pools.values())
        quota += -(-short // sum(pool > quota for pool in pools.values()))
        while len(chosen) < size:
            for scene in scenes.draw_scenes(64, split, rng):
                if scene.caption not in chosen and counts[scene.kind] < quota and len(chosen) < size:
                    chosen[scene.caption] = None
                    counts[scene.kind] += 1
        path = Path(__file__).parent / "prompts" / f"{split}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(caption + "\n" for caption in chosen))


if __name__ == "__main__":
    main()
