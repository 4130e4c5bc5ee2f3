"""GenEval in miniature (Ghosh et al., arXiv 2310.11513): what a prompt's metadata demands, judged by the detector.

Metadata are GenEval's: {"include": [{"class": "dog", "count": 1, "color": "red", "position": ["left of", 0]}],
"exclude": [{"class": "dog", "count": 2}]}. In EmojiScenes a colour is the background's.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedrl_lab.compositor import COLORS, OBJECTS
from speedrl_lab.config import nearest
from speedrl_lab.prompts import read_prompts
from speedrl_lab.rewards import Reward
from speedrl_lab.rewards.embedded import WEIGHTS, load_detector
from speedrl_lab.rewards.files import identify
from speedrl_lab.scenes import Scene, parse_caption
from speedrl_lab.trajectory import Trajectory

MOST = 2
"""The detector counts to two."""
TAGS = {"one": "single_object", "two": "counting", "and": "two_object", "left": "position", "above": "position"}
POSITIONS = {
    "left of": (0, operator.lt), "right of": (0, operator.gt), "above": (1, operator.lt), "below": (1, operator.gt),
}  # fmt: skip
"""Which coordinate of two centres is compared, (x, y), and how; y grows downwards."""


@dataclass(frozen=True)
class Clause:
    """One entry of `include`: ids of the object and of the background or None, and the place it must take."""

    object: int
    count: int
    color: int | None = None
    position: tuple[str, int] | None = None
    """Relation, and the index of the entry it relates to."""


@dataclass(frozen=True)
class Demand:
    """All that a prompt asks for: every entry of `include` must hold, and none of `exclude` may."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def geneval_reward(file: str = "", device: torch.device | str = "cpu") -> Reward:
    """1.0 where the picture shows what its metadata include and nothing that they exclude, else 0.0.

    As in GenEval, more objects than `count` are fine unless excluded. Metadata come from a prompt file
    (.jsonl), for prompts that are not in it and without a file from the caption itself (`metadata_of`).
    Raises ValueError in one line, before any picture is seen, for metadata that the detector cannot judge.
    """
    demands = {}
    for prompt in read_prompts(file) if file else ():
        try:
            demands[prompt.text] = read_metadata(prompt.metadata)
        except ValueError as error:
            raise ValueError(f"{file} line {prompt.line}: {error}") from None
    detector = load_detector(device)

    @torch.no_grad()
    def reward(images: Tensor, prompts: Sequence[str], trajectory: Trajectory) -> Tensor:
        for prompt in prompts:
            if prompt not in demands:
                demands[prompt] = read_metadata(metadata_of(parse_caption(prompt)))
        counts, colors, centers = detector(images.to(device, torch.float32))
        answers = counts.argmax(-1).cpu(), colors.argmax(-1).cpu(), centers.cpu()
        met = [judge(demands[prompt], *answer) for prompt, *answer in zip(prompts, *answers, strict=True)]
        return torch.tensor(met, dtype=torch.float32, device=images.device)

    judge_of = identify(WEIGHTS / "detector.safetensors")
    reward.record = f"EmojiScenes, {judge_of}; metadata of " + (identify(Path(file)) if file else "the caption itself")
    return reward


def judge(demand: Demand, counts: Tensor, color: Tensor, centers: Tensor) -> bool:
    """Whether counts (O,), a background id () and centres (O, 2) meet a demand.

    A relation needs exactly one of either object: only then the detector knows where they are.
    """
    for clause in demand.include:
        if counts[clause.object] < clause.count or clause.color not in (None, int(color)):
            return False
        if clause.position is not None:
            relation, target = clause.position
            pair = [clause.object, demand.include[target].object]
            axis, holds = POSITIONS[relation]
            if counts[pair].tolist() != [1, 1] or not holds(*centers[pair, axis].tolist()):
                return False
    return all(counts[clause.object] < clause.count for clause in demand.exclude)


def metadata_of(scene: Scene) -> dict[str, Any]:
    """GenEval's metadata of an EmojiScenes caption; an object more than it names is excluded."""
    include: list[dict[str, Any]] = [{"class": name, "count": count} for name, count in scene.counts.items()]
    if scene.background is not None:
        include = [{**clause, "color": scene.background} for clause in include]
    if scene.kind in ("left", "above"):
        first, second = include
        include = [second, {**first, "position": ["left of" if scene.kind == "left" else "above", 0]}]
    exclude = [{"class": name, "count": count + 1} for name, count in scene.counts.items()]
    return {"tag": TAGS[scene.kind], "include": include, "exclude": exclude, "prompt": scene.caption}


def read_metadata(metadata: Mapping[str, Any]) -> Demand:
    """Check and translate metadata; ValueError in one line for what the detector cannot judge."""
    include = metadata.get("include")
    if not isinstance(include, list) or not include:
        raise ValueError('no list "include" in the metadata; expected GenEval\'s [{"class": "dog", "count": 1}]')
    clauses = tuple(_clause(entry, index, MOST) for index, entry in enumerate(include))
    return Demand(clauses, tuple(_clause(entry, 0, MOST + 1) for entry in metadata.get("exclude", [])))


def _clause(entry: Any, index: int, most: int) -> Clause:
    """Entry `index` of a list; its position may relate to an earlier entry only, as GenEval's do."""
    if not isinstance(entry, Mapping):
        raise ValueError(f'{entry!r} is no entry of "include"; expected {{"class": "dog", "count": 1}}')
    name, count, color = entry.get("class"), entry.get("count", 1), entry.get("color")
    if name not in OBJECTS:
        raise ValueError(f"unknown class {name!r}; nearest: {nearest(str(name), list(OBJECTS))!r}")
    if type(count) is not int or not 1 <= count <= most:
        raise ValueError(f"count={count!r} of {name!r}: expected 1 to {most}, the detector counts no further")
    if color is not None and color not in COLORS:
        raise ValueError(f"unknown color {color!r}; nearest: {nearest(str(color), list(COLORS))!r}")
    position = entry.get("position")
    if position is not None:
        known = isinstance(position, list | tuple) and len(position) == 2 and position[0] in POSITIONS
        if not known or position[1] not in range(index):
            raise ValueError(
                f"position={position!r} of {name!r}: expected one of {', '.join(POSITIONS)} and the index of an "
                'earlier entry, as ["left of", 0]'
            )
        position = (position[0], position[1])
    return Clause(OBJECTS.index(name), count, None if color is None else list(COLORS).index(color), position)
