"""The widgets of a training board: progress, buttons, a field for each weight, two pictures.

Callbacks only note what was asked for, because they may run in another thread than the training; the board reads
it between two iterations. Errors in a callback would vanish in JupyterLab, so each writes into an Output.
"""

import html
import io
import queue
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
from PIL import Image

from speedrl_lab.config import TrainConfig
from speedrl_lab.steering import check_change

MOST_NOTES = 6
"""Lines below the weights; older ones go."""


class Controls:
    """What a person sees and presses; `paused` and `stopped` say what was pressed, `weights[name]` are fields."""

    def __init__(self, weights: Mapping[str, float], config: TrainConfig):
        self.config, self.paused, self.stopped = config, False, False
        self._asked: queue.SimpleQueue[tuple[str, float]] = queue.SimpleQueue()
        self._accepted = dict(weights)
        self._notes: list[str] = []
        self._errors = ipywidgets.Output()
        self.bar = ipywidgets.IntProgress(0, 0, config.iterations, layout={"width": "18em"})
        self.status, self.notes = ipywidgets.HTML("starts"), ipywidgets.HTML()
        self.pause, self.go_on, self.stop = (
            ipywidgets.Button(description=text, icon=icon, disabled=text == "Go on", layout={"width": "7em"})
            for text, icon in (("Pause", "pause"), ("Go on", "play"), ("Stop", "stop"))
        )
        self.weights = {
            name: ipywidgets.FloatText(
                weight, description=name, step=0.01 if name == "kl" else 0.1, continuous_update=False,
                style={"description_width": "initial"},
                layout={"width": f"{7 + 0.55 * len(name):g}em", "margin": "2px 1em 2px 2px"},
            )
            for name, weight in weights.items()
        }  # fmt: skip
        look = {"max_width": "100%", "align_self": "flex-start"}  # a box would stretch them
        self.curves, self.film = (ipywidgets.Image(format="png", layout={**look, "width": "980px"}) for _ in range(2))
        for button, act in ((self.pause, self._pause), (self.go_on, self._go_on), (self.stop, self._stop)):
            button.on_click(self._errors.capture()(act))
        for name, field in self.weights.items():
            field.observe(self._errors.capture()(lambda change, name=name: self._ask(name, change)), "value")
        row = {"flex_flow": "row wrap", "align_items": "center"}
        self.box = ipywidgets.VBox([
            ipywidgets.HBox([self.pause, self.go_on, self.stop, self.bar, self.status], layout=row),
            ipywidgets.HBox([ipywidgets.HTML("<b>weights</b>&ensp;"), *self.weights.values()], layout=row),
            self.notes, self.curves, self.film, self._errors,
        ])  # fmt: skip

    def _pause(self, button: ipywidgets.Button) -> None:
        self.paused, self.pause.disabled, self.go_on.disabled = True, True, False
        self.pause.description = "Pausing"  # after this iteration

    def _go_on(self, button: ipywidgets.Button) -> None:
        self.paused, self.pause.disabled, self.go_on.disabled = False, False, True
        self.pause.description = "Pause"

    def _stop(self, button: ipywidgets.Button) -> None:
        self.stopped = True
        for other in (self.pause, self.go_on, self.stop):
            other.disabled = True
        self._note("stops after this iteration")

    def _ask(self, name: str, change: Mapping[str, Any]) -> None:
        if change["new"] == self._accepted[name]:
            return
        try:
            check_change(self.config, name, change["new"])
        except ValueError as error:
            self._note(str(error))
            self.weights[name].value = self._accepted[name]  # a field says what is in force
            return
        self._accepted[name] = change["new"]
        self._asked.put((name, change["new"]))
        self._note(f"{name} = {change['new']:g} from the next iteration on")

    def changes(self) -> dict[str, float]:
        """The weights that were asked for since the last call, the latest of each."""
        asked = {}
        while not self._asked.empty():
            name, weight = self._asked.get()
            asked[name] = weight
        return asked

    def hold(self) -> None:
        """Say that training waits now."""
        if self.pause.description == "Pausing":
            self.pause.description = "Paused"

    def say(self, text: str, iteration: int) -> None:
        """Note what happened in an iteration."""
        self._notes = [note for note in self._notes if not note.endswith("from the next iteration on")]
        self._note(f"iteration {iteration}: {text}")

    def progress(self, iteration: int, status: str, warnings: Sequence[str]) -> None:
        """Show how far the training is, and its warnings."""
        self.bar.value, self.status.value = iteration, html.escape(status)
        for warning in warnings:
            self._note(warning)

    def show_film(self, picture: bytes) -> None:
        """Show a PNG file of 144 pixels an inch, no wider than it is."""
        self.film.layout.width = f"{Image.open(io.BytesIO(picture)).width * 96 // 144}px"
        self.film.value = picture

    def _note(self, text: str) -> None:
        self._notes = [*self._notes, text][-MOST_NOTES:]
        self.notes.value = "<br>".join(map(html.escape, self._notes))

    def close(self) -> None:
        """Take the widgets away; pictures leave nothing in a notebook that stores the state of widgets."""
        self.curves.value = self.film.value = b""
        rows = [self.box, *self.box.children[:2]]
        for widget in [*rows, *(child for row in rows for child in row.children)]:
            widget.close()
