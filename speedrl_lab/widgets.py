"""Widgets: thin shells around `plots` for a notebook; without a front end they only print.

Errors in a callback would vanish in JupyterLab, so every callback writes into an Output that is shown.
"""

import html
import io
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import pandas as pd
from IPython import get_ipython
from IPython.display import Image, display
from PIL import Image as Pillow
from torch import Tensor

from speedrl_lab import plots
from speedrl_lab.config import TrainConfig
from speedrl_lab.generator import MaskedGenerator

PICTURE_WIDTH = 128
"""Pixels on the screen, about; pictures grow by whole factors and stay crisp."""
LOG_LINES = 20
"""Plain lines printed over a whole training run."""


def picture_png(image: Tensor) -> bytes:
    """An image (3, H, W) in [0, 1] as a PNG file, enlarged without blur."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    factor = max(1, PICTURE_WIDTH // pixels.shape[1])
    buffer = io.BytesIO()
    Pillow.fromarray(np.kron(pixels, np.ones((factor, factor, 1), dtype=np.uint8))).save(buffer, "png")
    return buffer.getvalue()


def film_player(states: plots.States, generator: MaskedGenerator, prompts: Sequence[str]) -> ipywidgets.VBox:
    """Play, scrub or step through the unmasking of B prompts; the slider is `.children[0].children[1]`."""
    film = plots.frames(states, generator)  # (T + 1, B, 3, H, W)
    files = [[picture_png(image) for image in moment] for moment in film]
    known = (plots.tokens_by_step(states) != generator.spec.mask_id).float().mean((1, 2)).tolist()
    last = len(files) - 1
    width = ipywidgets.Layout(width=f"{PICTURE_WIDTH + 20}px")
    pictures = [ipywidgets.Image(value=file, format="png") for file in files[0]]
    texts = [f'<div style="line-height: 1.3">{html.escape(prompt)}</div>' for prompt in prompts]
    captions = [ipywidgets.HTML(text, layout=width) for text in texts]
    cells = [ipywidgets.VBox(pair, layout=width) for pair in zip(pictures, captions, strict=True)]
    play = ipywidgets.Play(min=0, max=last, interval=400, show_repeat=False)
    slider = ipywidgets.IntSlider(0, 0, last, description="step")
    back, forward = (ipywidgets.Button(description=text, layout={"width": "3em"}) for text in "<>")
    status, errors = ipywidgets.Label(), ipywidgets.Output()

    @errors.capture()
    def show(change: Mapping[str, Any]) -> None:
        step = change["new"]
        for picture, file in zip(pictures, files[step], strict=True):
            picture.value = file
        status.value = f"{step} of {last}: {known[step - 1] if step else 0:.0%} of the tokens known"

    @errors.capture()
    def move(button: ipywidgets.Button) -> None:
        slider.value = min(max(slider.value + (1 if button is forward else -1), 0), last)

    slider.observe(show, "value")
    back.on_click(move)
    forward.on_click(move)
    ipywidgets.jslink((play, "value"), (slider, "value"))
    show({"new": 0})
    controls = ipywidgets.HBox([play, slider, back, forward, status])
    return ipywidgets.VBox([controls, ipywidgets.HBox(cells, layout={"flex_flow": "row wrap"}), errors])


class Board:
    """The live board of a training run: one figure, redrawn in place, and a plain line now and then.

    The lines are for batch logs. Drawing takes at most about a twentieth of the time. `earlier` are
    records of the same run, from before it was stopped.
    """

    def __init__(self, config: TrainConfig, earlier: pd.DataFrame | None = None):
        self.config = config
        self.records: list[Mapping[str, Any]] = [] if earlier is None else earlier.to_dict("records")
        self.drawings = 0
        self._shell = get_ipython() is not None
        self._handle = None
        self._next = 0.0
        self._said: set[str] = set()

    def update(self, record: Mapping[str, Any]) -> None:
        """Take the record of one iteration; redraw at most once a second."""
        # What was done after the last checkpoint is done again.
        self.records = [old for old in self.records if old["iteration"] < record["iteration"]] + [record]
        for warning in record.get("warnings", ()):
            kind = re.sub(r"[\d.]+", "#", warning)
            if kind not in self._said:
                self._said.add(kind)
                sys.stdout.write(f"iteration {record['iteration']}: {warning}\n")
        every = max(1, self.config.iterations // LOG_LINES)
        if record["iteration"] % every == 0 or len(self.records) == 1:
            sys.stdout.write(log_line(record, self.config.iterations) + "\n")
        if time.monotonic() >= self._next:
            self.draw()

    def draw(self) -> None:
        """Show the curves of all records now."""
        if not self._shell or not self.records:
            return
        began = time.monotonic()
        picture = Image(plots.png(plots.curves(self.records)), width=900)
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)
        self.drawings += 1
        ended = time.monotonic()
        self._next = ended + max(1.0, 20 * (ended - began))

    def close(self) -> None:
        """Draw the last state; the records stay in `records`."""
        self.draw()


def log_line(record: Mapping[str, Any], iterations: int) -> str:
    """One iteration in one line of text."""
    rewards = ", ".join(f"{name} {value:.3f}" for name, value in record["rewards"].items())
    return (
        f"iteration {record['iteration']} of {iterations}: {rewards}, steps {record['steps']:.2f}, "
        f"KL {record['kl']:.4f}, diversity {record['diversity']:.3f}, {record['seconds']:.1f} s"
    )
