"""The trajectory microscope: play, scrub and step through films side by side; the figures work without a front end.

Errors in a callback would vanish in JupyterLab, so every callback writes into an Output that is shown.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from speedrl_lab import canvas, films, plots
from speedrl_lab.films import Film

PICTURE_WIDTH = 224
MAP_WIDTH = 104
"""Pixels on the screen, about; pictures grow by whole factors and stay crisp."""
PANEL_WIDTH = 392
"""Pixels of a film: room for the longest line, so that nothing moves while it plays."""
VIEWS = {"known tokens": "known", "best guess": "guess"}
CREDIT = "score gained"


def contact_sheet(film: Film, row: int = 0, most: int = 9) -> Figure:
    """One sample, moment by moment: known tokens, best guess, order, entropy, confidence."""
    moments = np.unique(np.linspace(0, len(film), min(most, len(film) + 1)).round().astype(int))
    kinds = {
        "known": "known tokens",
        "guess": "best guess",
        "order": "order so far\n(dark: first)",
        "entropy": f"entropy\n(bright: {films.scale(film):.1f} nats)",
        "confidence": "confidence\n(bright: 1)",
    }
    width = film.previews.shape[-1]
    shown = [films.enlarged(films.picture(film, kind, moment, row), width) for kind in kinds for moment in moments]
    images = [torch.from_numpy(pixels).permute(2, 0, 1) / 255 for pixels in shown]
    side = max(image.shape[-1] for image in images)  # where the grid does not divide the picture
    images = torch.stack([torch.nn.functional.interpolate(image[None], (side, side))[0] for image in images])
    titles = ["start" if moment == 0 else f"step {moment}" for moment in moments]
    return plots.image_grid(images, columns=len(moments), row_titles=list(kinds.values()), column_titles=titles)


def chart(shown: Sequence[Film], row: int = 0, moment: int | None = None) -> Figure:
    """Tokens revealed, mean entropy of what is masked and credit at each step of one sample, a colour a film.

    The step of `moment` is marked.
    """
    scored = any(not film.score.isnan().all() for film in shown)
    figure, panels = canvas.panels(2 + scored, 3, 3.3, 2.3)
    for index, film in enumerate(shown):
        steps, color = np.arange(1, int(film.trajectory.steps[row]) + 1), plots.COLORS[index]
        counts = [int(film.trajectory.revealed(step - 1)[row].sum()) for step in steps]
        entropies = film.entropy[: len(steps), row].nanmean(1)
        values = [counts, entropies.numpy()] + ([film.credit[: len(steps), row].numpy()] if scored else [])
        width = 0.8 / len(shown)
        offset = (index - (len(shown) - 1) / 2) * width
        for axes, heights in zip(panels, values, strict=True):
            axes.bar(steps + offset, heights, width, color=color, label=film.title)
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if moment:
            axes.axvspan(moment - 0.5, moment + 0.5, color=canvas.INK, alpha=0.25, linewidth=0, zorder=0)
    canvas.label(panels[0], "tokens revealed", "step", "tokens")
    canvas.label(panels[1], "entropy of what is masked", "step", "nats, mean")
    if scored:
        panels[2].axhline(0, color=canvas.INK, linewidth=0.8)
        canvas.label(panels[2], "step credit", "step", CREDIT)
    figure.tight_layout()
    if len(shown) > 1:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, fontsize=9, labelcolor=canvas.INK, loc="lower center",
                      bbox_to_anchor=(0.5, 1.0), ncols=len(shown))  # fmt: skip
    return figure


class Microscope:
    """Films of the same prompts side by side; `.box` is shown. `slider`, `prompt` and `view` hold what is seen.

    Raises ValueError where the films are of different prompts.
    """

    def __init__(self, shown: Sequence[Film]):
        if not shown or any(film.prompts != shown[0].prompts for film in shown):
            raise ValueError(f"got {len(shown)} films, not all of the same prompts; expected at least one, of the same")
        self.films = list(shown)
        last = max(map(len, shown))
        self.play = ipywidgets.Play(min=0, max=last, interval=600, show_repeat=False)
        self.slider = ipywidgets.IntSlider(0, 0, last, description="step")
        self.back, self.forward = (ipywidgets.Button(description=text, layout={"width": "3em"}) for text in "<>")
        choices = [(prompt, row) for row, prompt in enumerate(shown[0].prompts)]
        self.prompt = ipywidgets.Dropdown(options=choices, description="prompt", layout={"width": "30em"})
        self.view = ipywidgets.ToggleButtons(options=list(VIEWS.items()), style={"button_width": "auto"})
        self.panels = [Panel(film) for film in shown]
        self.chart = ipywidgets.Image(format="png", layout={"max_width": "100%", "width": f"{300 * self._charts()}px"})
        self._charted: dict[tuple[int, int], bytes] = {}
        self._errors = ipywidgets.Output()
        for control in (self.slider, self.prompt, self.view):
            control.observe(self._errors.capture()(self._show), "value")
        for button in (self.back, self.forward):
            button.on_click(self._errors.capture()(self._move))
        ipywidgets.jslink((self.play, "value"), (self.slider, "value"))
        self.box = ipywidgets.VBox([
            ipywidgets.HBox([self.prompt, self.view], layout={"flex_flow": "row wrap"}),
            ipywidgets.HBox([self.play, self.slider, self.back, self.forward]),
            ipywidgets.HBox([panel.box for panel in self.panels], layout={"flex_flow": "row wrap"}),
            self.chart, self._errors,
        ])  # fmt: skip
        self._show({})

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.box)

    def _charts(self) -> int:
        return 2 + any(not film.score.isnan().all() for film in self.films)

    def _show(self, change: Mapping[str, Any]) -> None:
        moment, row = self.slider.value, self.prompt.value
        for panel in self.panels:
            panel.show(self.view.value, moment, row)
        if (row, moment) not in self._charted:
            self._charted[row, moment] = plots.png(chart(self.films, row, moment))
        self.chart.value = self._charted[row, moment]

    def _move(self, button: ipywidgets.Button) -> None:
        step = 1 if button is self.forward else -1
        self.slider.value = min(max(self.slider.value + step, 0), self.slider.max)


class Panel:
    """One film of a microscope: picture, three maps, one line."""

    def __init__(self, film: Film):
        self.film = film
        self.picture = _image(film.previews.shape[-1], PICTURE_WIDTH)
        self.maps = {kind: _image(film.grid[1], MAP_WIDTH) for kind in films.KINDS}
        units = {"order": "order: dark first", "entropy": f"entropy: bright {films.scale(film):.1f} nats",
                 "confidence": "confidence: bright 1"}  # fmt: skip
        self.status = ipywidgets.HTML()
        cells = [
            ipywidgets.VBox(
                [image, ipywidgets.HTML(f'<div style="font-size:80%;line-height:1.3">{units[kind]}</div>')],
                layout={"width": f"{PANEL_WIDTH // 3}px"},
            )
            for kind, image in self.maps.items()
        ]
        title = ipywidgets.HTML(f"<b>{html.escape(film.title)}</b>")
        parts = [title, self.picture, self.status, ipywidgets.HBox(cells)]
        self.box = ipywidgets.VBox(parts, layout={"margin": "0 16px 0 0", "width": f"{PANEL_WIDTH}px"})

    def show(self, view: str, moment: int, row: int) -> None:
        """Show a moment of a sample; `view` is known or guess."""
        pixels = films.picture(self.film, view, moment, row)
        self.picture.value = films.png(films.enlarged(pixels, PICTURE_WIDTH))
        for kind, image in self.maps.items():
            image.value = films.png(films.enlarged(films.picture(self.film, kind, moment, row), MAP_WIDTH))
        self.status.value = html.escape(films.status(self.film, moment, row))


def _image(pixels: int, width: int) -> ipywidgets.Image:
    """A place for a picture that is `pixels` wide before it is enlarged; boxes would stretch it."""
    large = pixels * max(1, width // pixels)
    return ipywidgets.Image(format="png", layout={"width": f"{large}px", "align_self": "flex-start"})
