"""Write a prompt file in which one kind of scene is more frequent, to practise what fails most.

    python data/weigh_prompts.py and 1200 pairs.txt

So many different captions of the kind (one, two, and, left, above) from the training split, and the committed training
prompts of all other kinds, shuffled.
"""

import argparse
from pathlib import Path

import torch

from speedrl_lab import scenes


def weighted(kind: str, count: int) -> list[str]:
    """The captions; raises ValueError where the training split has fewer of the kind."""
    rng = torch.Generator().manual_seed(0)
    wanted = [s.caption for s in scenes.all_scenes() if s.kind == kind and scenes.split_of(s) == "train"]
    if not 0 < count <= len(wanted):
        raise ValueError(f"count={count}: expected 1 to {len(wanted)}, the training captions of kind {kind!r}")
    others = [prompt for prompt in scenes.load_prompts("train") if scenes.parse_caption(prompt).kind != kind]
    captions = [wanted[place] for place in torch.randperm(len(wanted), generator=rng)[:count].tolist()] + others
    return [captions[place] for place in torch.randperm(len(captions), generator=rng).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=scenes.KINDS)
    parser.add_argument("count", type=int)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    if options.file.exists():
        parser.error(f"{options.file} exists; move it away or choose another name")
    try:
        captions = weighted(options.kind, options.count)
    except ValueError as error:
        parser.error(str(error))
    options.file.write_text("".join(caption + "\n" for caption in captions))
    print(f"{options.file}: {len(captions)} captions, {options.count / len(captions):.0%} of them {options.kind!r}")


if __name__ == "__main__":
    main()
