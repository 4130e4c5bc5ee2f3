"""The film of an unmasking: what the network saw, believed and drew at every step; as a GIF or a page too."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from speedrl_lab import plots
from speedrl_lab.config import SamplerConfig
from speedrl_lab.generator import MaskedGenerator, StepInfo
from speedrl_lab.page import write_parts
from speedrl_lab.rewards import Reward
from speedrl_lab.sampler import policy_logits, sample
from speedrl_lab.trajectory import Trajectory

LARGEST = 256
"""Pixels of a picture's longer side in exports and widgets, at most; smaller ones grow by whole factors."""
MAP_COLORS = "viridis"
GREY = 128
"""Of positions that a map says nothing of; the map's own colours hold no grey."""


@dataclass(frozen=True)
class Film:
    """One unmasking of B prompts in T steps, on the CPU; moment 0 is all masked, moment t is after step t."""

    title: str
    prompts: list[str]
    trajectory: Trajectory
    grid: tuple[int, int]
    """Token rows and columns."""
    entropy: Tensor
    """Of the distribution that step t sees at each position still masked, nats, float32 (T, B, N); else NaN."""
    confidence: Tensor
    """Its largest probability, (T, B, N); NaN where the token is known."""
    previews: Tensor
    """Known tokens show their patch of the final picture, others a chequer, uint8 (T + 1, B, 3, H, W)."""
    guesses: Tensor
    """The most probable token at every masked position filled in at once, decoded, uint8 (T + 1, B, 3, H, W)."""
    score: Tensor
    """Reward of each guess, float32 (T + 1, B); NaN where the film was made without a reward."""

    def __len__(self) -> int:
        return len(self.entropy)

    @property
    def credit(self) -> Tensor:
        """What each step changed, (T, B): score of the guess after it minus that before it.

        The credits of a sample sum to the score of its picture minus that of the guess from nothing.
        """
        return self.score[1:] - self.score[:-1]

    def known(self, moment: int) -> Tensor:
        """Which tokens are known at a moment, bool (B, N)."""
        return self.trajectory.reveal_step < moment


@torch.no_grad()
def film(
    generator: MaskedGenerator,
    prompts: Sequence[str],
    sampler: SamplerConfig,
    seed: int = 0,
    reward: Reward | None = None,
    title: str = "",
) -> Film:
    """Sample and watch; T more passes than sampling alone. `reward` scores the guesses, for `Film.credit`.

    Beliefs are those of the distribution sampled from: guided, divided by the temperature (before what an
    adaptive head does to it). Raises ValueError as `sample` does.
    """
    trajectory = sample(generator, prompts, sampler, seed)
    cond, total = generator.encode(prompts), int(trajectory.steps.max())
    entropies, confidences, filled = [], [], []
    for step in range(total):
        state = trajectory.state(step)  # (B, N)
        logits = policy_logits(generator, state, cond, sampler, StepInfo(step, sampler.steps))
        log_probs = logits.log_softmax(-1)  # (B, N, V)
        masked = trajectory.reveal_step >= step
        entropies.append((-(log_probs.exp() * log_probs).sum(-1)).where(masked, torch.nan))
        confidences.append(log_probs.amax(-1).exp().where(masked, torch.nan))
        filled.append(log_probs.argmax(-1).where(masked, trajectory.tokens))
    filled.append(trajectory.tokens)
    guesses = [generator.decode(tokens) for tokens in filled]
    scores = [torch.full((len(prompts),), torch.nan)] * len(guesses)
    if reward is not None:
        scores = [reward(images, list(prompts), trajectory).float().cpu() for images in guesses]
    return Film(
        title=title or describe(sampler),
        prompts=list(prompts),
        trajectory=trajectory,
        grid=generator.spec.grid,
        entropy=torch.stack(entropies).cpu(),
        confidence=torch.stack(confidences).cpu(),
        previews=torch.stack([_pixels(moment) for moment in plots.frames(trajectory, generator)]),
        guesses=torch.stack([_pixels(images) for images in guesses]),
        score=torch.stack(scores),
    )


def describe(sampler: SamplerConfig) -> str:
    """Settings in a few words."""
    guided = f", guidance {sampler.guidance_scale:g}" if sampler.guidance_scale != 1 else ""
    return f"{sampler.order}, {sampler.schedule}, steps: {sampler.steps}{guided}"


def _pixels(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as uint8, at most LARGEST pixels a side."""
    images, factor = images.float().cpu(), LARGEST / max(images.shape[-2:])
    if factor < 1:
        size = [max(1, round(side * factor)) for side in images.shape[-2:]]
        images = functional.interpolate(images, size=size, mode="bilinear", antialias=True)
    return (images.clamp(0, 1) * 255).round().byte()


def picture(film: Film, kind: str, moment: int, row: int) -> np.ndarray:
    """uint8 (H, W, 3): `known` or `guess` as decoded; or a map of the tokens, one pixel each.

    `order`: when each was revealed so far; `entropy` and `confidence`: of the step that comes next, dark is
    0, bright is ln V (the first step's maximum in the film) or 1; known tokens are grey.
    """
    moment = min(moment, len(film))
    if kind in ("known", "guess"):
        shown = film.previews if kind == "known" else film.guesses
        return shown[moment, row].permute(1, 2, 0).numpy()
    if kind == "order":
        steps = film.trajectory.reveal_step[row].cpu()
        value = torch.where(steps < moment, steps / max(1, len(film) - 1), torch.nan)
    elif moment == len(film):
        value = torch.full((film.entropy.shape[-1],), torch.nan)
    elif kind == "entropy":
        value = film.entropy[moment, row] / scale(film)
    else:
        value = film.confidence[moment, row]
    values = value.unflatten(0, film.grid).numpy()  # (rows, columns)
    colors = mpl.colormaps[MAP_COLORS](np.nan_to_num(values))[..., :3] * 255
    return np.where(np.isnan(values)[..., None], GREY, colors.round()).astype(np.uint8)


def scale(film: Film) -> float:
    """Entropy, in nats, that is drawn brightest: the largest of the film."""
    return max(float(film.entropy.nan_to_num(0.0).max()), 1e-6)


def status(film: Film, moment: int, row: int) -> str:
    """One line: step, share known, mean entropy of what is masked, the step's credit."""
    moment = min(moment, int(film.trajectory.steps[row]))
    known = float(film.known(moment)[row].float().mean())
    text = f"{moment} of {int(film.trajectory.steps[row])} steps, {known:.0%} known"
    if moment < len(film) and known < 1:
        text += f", entropy {float(film.entropy[moment, row].nanmean()):.2f} nats"
    if moment and not film.score.isnan().all():
        text += f", credit {round(float(film.credit[moment - 1, row]), 3) + 0.0:+.3f}"  # no -0.000
    return text


def enlarged(pixels: np.ndarray, width: int) -> np.ndarray:
    """A picture (H, W, 3) grown by the whole factor that comes nearest to `width`; without blur."""
    factor = max(1, width // pixels.shape[1])
    return pixels.repeat(factor, 0).repeat(factor, 1)


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_gif(path: Path | str, films: Sequence[Film], seconds: float = 0.5, width: int = 128) -> Path:
    """All prompts (columns) of all films (rows) as one GIF that ends on the pictures; returns its path."""
    path, last = Path(path), max(map(len, films))
    moments = [_sheet(films, moment, width) for moment in range(last + 1)]
    frames = [Image.fromarray(moment).quantize(256, dither=Image.Dither.NONE) for moment in moments]
    partial = path.with_name(path.name + ".partial")
    durations = [round(1000 * seconds)] * last + [round(4000 * seconds)]
    frames[0].save(partial, "gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    partial.replace(path)
    return path


def _sheet(films: Sequence[Film], moment: int, width: int) -> np.ndarray:
    """One moment of all films on a sheet, uint8 (H, W, 3), with a line of text above each row."""
    rows = []
    for shown in films:
        cells = [enlarged(picture(shown, "known", moment, index), width) for index in range(len(shown.prompts))]
        row = np.concatenate([np.pad(cell, ((2, 2), (2, 2), (0, 0)), constant_values=255) for cell in cells], 1)
        title = Image.new("RGB", (row.shape[1], 16), "white")
        text = f"{shown.title} - step {min(moment, len(shown))} of {len(shown)}"
        ImageDraw.Draw(title).text((3, 2), text, fill=(60, 60, 60))
        rows += [np.asarray(title), row]
    return np.concatenate(rows)


SCRIPT = """
const films = JSON.parse(document.getElementById('films').textContent);
const find = name => document.getElementById(name);
let moment = 0, timer = null;
function draw() {
  find('moment').value = moment;
  films.forEach((film, f) => film.samples.forEach((sample, s) => {
    const own = Math.min(moment, sample.known.length - 1);
    for (const kind of ['preview', 'order', 'entropy', 'confidence']) {
      const shown = kind === 'preview' ? sample[find('kind').value] : sample[kind];
      find([f, s, kind].join('-')).src = 'data:image/png;base64,' + shown[own];
    }
    find([f, s, 'status'].join('-')).textContent = sample.status[own];
  }));
}
function pause() { clearInterval(timer); timer = null; find('play').textContent = 'Play'; }
function go(to) { moment = Math.max(0, Math.min(+find('moment').max, to)); draw(); }
find('play').onclick = () => {
  if (timer) return pause();
  if (moment === +find('moment').max) moment = -1;
  find('play').textContent = 'Pause';
  timer = setInterval(() => { go(moment + 1); if (moment === +find('moment').max) pause(); }, 500);
};
find('back').onclick = () => { pause(); go(moment - 1); };
find('next').onclick = () => { pause(); go(moment + 1); };
find('moment').oninput = event => { pause(); go(+event.target.value); };
find('kind').onchange = draw;
draw();
"""
STYLE = """<style>
.film { display: flex; flex-wrap: wrap; gap: 1.5rem; } .film td { border: 0; padding: 2px; text-align: left; }
.film img { image-rendering: pixelated; width: 96px; } .film img.large { width: 208px; } figure { margin: 0; }
.film small { display: block; }
.bar { position: sticky; top: 0; padding: .5rem 0; background: light-dark(#fff, #16181b); }
</style>"""
KINDS = {"order": "order: dark first", "entropy": "entropy: bright unsure", "confidence": "confidence: bright sure"}


def write_html(path: Path | str, films: Sequence[Film], title: str = "Unmasking") -> Path:
    """One page that plays the films side by side, online or off, and needs nothing else; returns its path."""
    last = max(map(len, films))
    parts = [STYLE, f"""<p class="bar"><button id="play">Play</button> <button id="back">&lt;</button>
<input id="moment" type="range" min="0" max="{last}" value="0"> <button id="next">&gt;</button>
<select id="kind"><option value="known">known tokens</option><option value="guess">best guess</option></select></p>"""]
    for row, prompt in enumerate(films[0].prompts):
        cells = "".join(_cell(shown, f"{index}-{row}") for index, shown in enumerate(films))
        parts.append(f'<h2>{html.escape(prompt)}</h2><div class="film">{cells}</div>')
    text = "Maps have one square a token; grey is known. " + "; ".join(
        f"{shown.title}: entropy up to {scale(shown):.1f} nats" for shown in films
    )
    data = json.dumps([{"samples": [_data(shown, row) for row in range(len(shown.prompts))]} for shown in films])
    parts.append(f'<p>{html.escape(text)}.</p><script type="application/json" id="films">{data}</script>')
    parts.append(f"<script>{SCRIPT}</script>")
    return write_parts(path, parts, title)


def _cell(film: Film, name: str) -> str:
    maps = "".join(
        f'<td><img id="{name}-{kind}" alt="{kind}"><small>{text}</small></td>' for kind, text in KINDS.items()
    )
    return (
        f'<figure><b>{html.escape(film.title)}</b><br><img class="large" id="{name}-preview" alt="picture">'
        f'<small id="{name}-status"></small><table><tr>{maps}</tr></table></figure>'
    )


def _data(film: Film, row: int) -> dict[str, list[str]]:
    kinds = {
        kind: [base64.b64encode(png(picture(film, kind, moment, row))).decode() for moment in range(len(film) + 1)]
        for kind in ("known", "guess", *KINDS)
    }
    return kinds | {"status": [status(film, moment, row) for moment in range(len(film) + 1)]}
