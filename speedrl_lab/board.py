"""The live board of a training run: curves, samples over time, cost; pause, go on, stop, change a weight.

In JupyterLab it is one widget, updated in place. The cell stays busy while it trains, and buttons act between
two iterations, where `Board.show` awaits: an ipykernel from 7.4 on then hears widgets, earlier ones of version 7
hear them on a subshell, and from ipykernel 6 `widget_events` fetches their messages. An interrupt of the kernel
acts there, too. Without a front end (papermill, nbval, a terminal) it prints a line now and then. Both end as one
still picture, since widgets do not outlive their kernel.
"""

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from IPython import get_ipython
from IPython.display import Image, display
from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from speedrl_lab import board_plots, plots
from speedrl_lab.config import TrainConfig
from speedrl_lab.controls import Controls
from speedrl_lab.generator import MaskedGenerator
from speedrl_lab.runs import Run
from speedrl_lab.sampler import sample
from speedrl_lab.steering import changeable

LOG_LINES = 20
"""Plain lines printed over a whole training run."""
MOMENTS = 8
"""Times that the fixed prompts are drawn again over a whole run, beside iteration 1."""
ROWS = 4
"""Prompts that are drawn, spread over those given."""
PATIENCE = 0.05
"""Seconds after each iteration in which buttons are heard, and between two looks at them while training pauses."""


class Stopped(Exception):
    """The stop button was pressed; ends the cell, and those that were to run after it, in one line."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class Board:
    """The live board of a run. `show` follows the records of `train`, whose `steer` is `Board.steer`.

    `generator` draws ROWS of the `prompts`, always the same from the seed of `config`, in iteration 1 and at
    MOMENTS more; they are kept in the run's folder, `samples/`. With a `run`, what it did before it was stopped
    is shown, too.
    Drawing curves takes at most about a twentieth of the time.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Run | None = None,
        generator: MaskedGenerator | None = None,
        prompts: Sequence[str] = (),
    ):
        self.config, self.run, self.generator = config, run, generator
        self.prompts = list(prompts[:: max(1, len(prompts) // ROWS)][:ROWS])
        self.records: list[Mapping[str, Any]] = [] if run is None else run.records().to_dict("records")
        self.moments = {} if run is None else read_moments(run.path / "samples", self.prompts)
        self.drawings = 0
        self.controls = Controls(self._in_force(), config) if has_front_end() else None
        self._shell = get_ipython() is not None
        self._handle = None
        self._next = 0.0
        self._said: set[str] = set()

    def _in_force(self) -> dict[str, float]:
        """The weights that may be changed, as they are now."""
        start = {**self.config.quality_weights, "speed": self.config.speed_weight, "kl": self.config.kl_weight}
        for changed in board_plots.changes(self.records).values():
            start |= changed
        return {name: start[name] for name in changeable(self.config)}

    def steer(self, iteration: int) -> dict[str, float]:
        """The weights changed on the board since the last iteration; for `train(..., steer=board.steer)`."""
        changed = {} if self.controls is None else self.controls.changes()
        if changed:
            self.controls.say(", ".join(f"{name} = {weight:g}" for name, weight in changed.items()), iteration)
        return changed

    async def show(self, records: Iterator[Mapping[str, Any]], most: int | None = None) -> None:
        """Follow the records of `train` to the end, or `most` of them, and leave a still picture.

        In a notebook: `await board.show(records)`. Raises Stopped where the button was pressed; by then, and
        after an interrupt, the state is saved.
        """
        self._place()
        try:
            with closing(records):  # the loop saves its state when it is left
                for count, record in enumerate(records, 1):
                    self.update(record)
                    if not await self._goes_on() or count == most:
                        break
        finally:
            late = {} if self.controls is None else self.controls.changes()
            self.close()
            for name, weight in late.items():
                told = f"{name} = {weight:g} was asked for after this cell's last iteration: enter it again"
                sys.stdout.write(told + "\n")
        if self.controls is not None and self.controls.stopped:
            where = "" if self.run is None else f" {self.run.path / 'checkpoint.pt'} is written;"
            raise Stopped(
                f"Stopped after iteration {self.records[-1]['iteration']} of {self.config.iterations}.{where} "
                "run this cell again to go on."
            )

    async def _goes_on(self) -> bool:
        """Hear the buttons, and wait while training pauses; False where it is to stop."""
        if self.controls is None:
            await asyncio.sleep(0)  # for an interrupt
            return True
        while True:
            await asyncio.sleep(PATIENCE)
            widget_events()
            if self.controls.stopped or not self.controls.paused:
                return not self.controls.stopped
            self.controls.hold()

    def update(self, record: Mapping[str, Any]) -> None:
        """Take the record of one iteration; draw curves at most once a second."""
        # What was done after the last checkpoint is done again.
        self.records = [old for old in self.records if old["iteration"] < record["iteration"]] + [record]
        self._sample(record["iteration"])
        told = [text for text in record.get("warnings", ()) if self._new(text)]
        warnings = [f"iteration {record['iteration']}: {text}" for text in told]
        every = max(1, self.config.iterations // LOG_LINES)
        if self.controls is not None:
            self.controls.progress(record["iteration"], status(self.records, self.config), warnings)
        else:
            if record["iteration"] % every == 0 or len(self.records) == 1:
                warnings.append(log_line(record, self.config.iterations))
            sys.stdout.writelines(line + "\n" for line in warnings)
        if time.monotonic() >= self._next:
            self.draw()

    def _new(self, warning: str) -> bool:
        """Whether this kind of warning was not given before."""
        kind = re.sub(r"[\d.]+", "#", warning)
        known = kind in self._said
        self._said.add(kind)
        return not known

    def _sample(self, iteration: int) -> None:
        """Draw the fixed prompts where it is time."""
        every = max(1, self.config.iterations // MOMENTS)
        if self.generator is None or not self.prompts or (iteration % every and iteration != 1):
            return
        trajectory = sample(self.generator, self.prompts, self.config.sampler, seed=self.config.seed)
        moment = self.generator.decode(trajectory.tokens).cpu(), trajectory.steps.tolist()
        self.moments[iteration] = moment
        if self.run is not None:
            write_moment(self.run.path / "samples", iteration, self.prompts, *moment)
        if self.controls is not None:
            self.controls.show_film(self._film())

    def _curves(self) -> bytes:
        samples = self.config.num_groups * self.config.group_size
        return plots.png(board_plots.curves(self.records, samples))

    def _film(self) -> bytes:
        return plots.png(board_plots.film(self.moments, self.prompts))

    def _still(self) -> Image:
        """Curves and samples as one picture."""
        pictures = [self._curves(), *([self._film()] if self.moments else [])]
        return Image(board_plots.stacked(pictures), width=980)

    def _place(self) -> None:
        """Show the widgets, where there is a front end."""
        if self.controls is None or self._handle is not None:
            return
        if self.moments:
            self.controls.show_film(self._film())
        self._handle = display(self.controls.box, display_id=True)

    def draw(self) -> None:
        """Draw the curves of all records now."""
        if not self._shell or not self.records:
            return
        began = time.monotonic()
        if self.controls is not None:
            self.controls.curves.value = self._curves()
        else:
            self._put(self._still())
        self.drawings += 1
        ended = time.monotonic()
        self._next = ended + max(1.0, 20 * (ended - began))

    def _put(self, picture: Image) -> None:
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)

    def close(self) -> None:
        """Leave the last state as a still picture where the board was; the records stay in `records`."""
        if self._shell and self.records:
            self._put(self._still())
            self.drawings += 1
        if self.controls is not None:
            self.controls.close()


def has_front_end() -> bool:
    """Whether a person may be looking: JupyterLab names the cell that it runs, batch runners do not."""
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and bool((kernel.get_parent().get("metadata") or {}).get("cellId"))


def widget_events() -> None:
    """Handle the messages of widgets that wait while the cell is busy; what else waits stays in order.

    For ipykernel 6; a later one does it by itself.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    waiting = getattr(kernel, "msg_queue", None)
    for _ in range(waiting.qsize() if waiting is not None else 0):
        number, dispatch, given = waiting.get_nowait()
        if dispatch == kernel.dispatch_shell:
            identities, parts = kernel.session.feed_identities(given[0], copy=False)
            # A look at the header alone: a message may be read in full only once.
            kind = kernel.session.deserialize(parts, content=False, copy=False)["header"]["msg_type"]
            if kind == "comm_msg":
                message = kernel.session.deserialize(parts, content=True, copy=False)
                kernel.comm_manager.comm_msg(kernel.shell_stream, identities, message)
                continue
        waiting.put_nowait((number, dispatch, given))


def status(records: Sequence[Mapping[str, Any]], config: TrainConfig) -> str:
    """Time and forward passes of a run: used, and to come at the pace of the last ten iterations."""
    done, seconds = records[-1]["iteration"], [record["seconds"] for record in records]
    left = (config.iterations - done) * float(np.median(seconds[-10:]))
    parts = [f"iteration {done} of {config.iterations}", f"{clock(sum(seconds))} used, about {clock(left)} to go"]
    if left:
        parts[-1] += f" (until {datetime.now() + timedelta(seconds=left):%H:%M})"
    passes = [record["passes"] for record in records if "passes" in record]
    if passes:
        total = sum(passes) + (config.iterations - done) * float(np.median(passes[-10:]))
        parts.append(f"{sum(passes) / 1e3:.1f} of about {total / 1e3:.1f} thousand network passes")
    return " · ".join(parts)


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, or m:ss below an hour."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def log_line(record: Mapping[str, Any], iterations: int) -> str:
    """One iteration in one line of text."""
    rewards = ", ".join(f"{name} {value:.3f}" for name, value in record["rewards"].items())
    changed = ", ".join(f"{name} {weight:g}" for name, weight in record.get("changed", {}).items())
    return (
        f"iteration {record['iteration']} of {iterations}: {rewards}, steps {record['steps']:.2f}, "
        f"KL {record['kl']:.4f}, diversity {record['diversity']:.3f}, {record['seconds']:.1f} s"
        + (f", weights changed: {changed}" if changed else "")
    )


def write_moment(folder: Path, iteration: int, prompts: Sequence[str], images: Tensor, steps: Sequence[int]) -> Path:
    """Keep the samples (B, 3, H, W) of an iteration side by side as `<iteration>.png`, prompts and steps inside."""
    folder.mkdir(exist_ok=True)
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(2, 0, 3, 1).flatten(1, 2)  # (H, B*W, 3)
    told = PngInfo()
    told.add_text("samples", json.dumps({"prompts": list(prompts), "steps": list(steps)}))
    partial, path = folder / "partial", folder / f"{iteration:05d}.png"
    Pillow.fromarray(pixels.cpu().numpy()).save(partial, "png", pnginfo=told)
    return partial.replace(path)


def read_moments(folder: Path, prompts: Sequence[str]) -> dict[int, tuple[Tensor, list[int]]]:
    """What `write_moment` wrote for the same prompts: iteration -> samples (B, 3, H, W) in [0, 1], steps."""
    moments = {}
    for path in sorted(folder.glob("[0-9]*.png")):
        with Pillow.open(path) as picture:
            told = json.loads(picture.text.get("samples", "{}"))
            if not prompts or told.get("prompts") != list(prompts):
                continue
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255  # (H, B*W, 3)
        images = pixels.unflatten(1, (len(prompts), -1)).permute(1, 3, 0, 2)  # (B, 3, H, W)
        moments[int(path.stem)] = images, told["steps"]
    return moments
