"""The what-if explorer: sliders for reward weights over rollouts that are there, and a button that trains.

A thin shell: numbers come from `whatif.explain`, pictures from `whatif_plots`. Errors in a callback would
vanish in JupyterLab, so every callback writes into an Output that is shown.
"""

import html
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args, get_type_hints

import ipywidgets

from speedrl_lab import plots, whatif, whatif_plots
from speedrl_lab.config import RunConfig, TrainConfig
from speedrl_lab.learner import Rollout
from speedrl_lab.runs import Run, outputs_root, write_atomic

FOLDER = "02_rewards"
PATIENCE = 15.0
"""Seconds between asking a training to end and killing it."""
WIDE = {"width": "24em"}


class Explorer:
    """Controls over one rollout; `.box` is shown, `.config` is what the controls say now.

    Every reward of the rollout but `speed` has a slider, `controls["weight: <name>"]`; the others are
    `controls[<name of the setting>]` and `controls["floor: reward"]`, `["floor: value"]`. A control that cannot
    act under the others is disabled. `prompt` chooses whose samples are listed.
    """

    def __init__(self, drawn: Rollout, config: RunConfig, policy: str = ""):
        self.drawn, self.start, self.policy = drawn, config, policy
        self.controls = controls(drawn, config.train)
        self.explanation: whatif.Explanation | None = None
        self.training: Training | None = None
        self._uris = [whatif_plots.image_uri(picture) for picture in whatif.thumbnails(drawn.images)]
        self._errors = ipywidgets.Output()
        look = {"max_width": "48%", "align_self": "flex-start"}  # a box would stretch them
        self._bars, self._cloud = (ipywidgets.Image(format="png", layout=look) for _ in range(2))
        self.verdict, self.warnings, self.samples = (ipywidgets.HTML() for _ in range(3))
        self.chosen = ipywidgets.HTML()
        self.use, self.train, self.stop = (
            ipywidgets.Button(description=text) for text in ("Use these", "Train", "Stop")
        )
        self.stop.disabled = True
        for control in self.controls.values():
            control.observe(self._errors.capture()(lambda change: self.update()), "value")
        for button, act in ((self.use, self._use), (self.train, self._train), (self.stop, self._stop)):
            button.on_click(self._errors.capture()(act))
        self.box = self._layout()
        self.update()

    def _layout(self) -> ipywidgets.VBox:
        weights = [control for name, control in self.controls.items() if name.startswith("weight: ")]
        others = [control for name, control in self.controls.items() if not name.startswith("weight: ")]
        half = (len(others) + 1) // 2
        columns = [ipywidgets.VBox(part) for part in (weights, others[:half], others[half:])]
        return ipywidgets.VBox([
            ipywidgets.HBox(columns, layout={"flex_flow": "row wrap"}), self.warnings, self.verdict,
            ipywidgets.HBox([self._bars, self._cloud], layout={"flex_flow": "row wrap"}), self.samples,
            ipywidgets.HBox([self.use, self.train, self.stop]), self.chosen, self._errors,
        ])  # fmt: skip

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.box)

    @property
    def config(self) -> RunConfig:
        """The settings that the controls say; raises ValueError as `TrainConfig` does."""
        return replace(self.start, train=settings(self.controls, self.start.train))

    def update(self) -> None:
        """Explain the rollout anew and show it; a combination that no training takes is said in one line."""
        enable(self.controls)
        try:
            config = self.config.train
            explanation = whatif.explain(self.drawn, config)
        except ValueError as error:
            self.warnings.value = note(str(error))
            return
        self.explanation = explanation
        self._bars.value = plots.png(whatif_plots.weight_bars(explanation))
        self._cloud.value = plots.png(whatif_plots.cloud(explanation, self.drawn, config))
        self.warnings.value = "".join(map(note, explanation.warnings))
        self.verdict.value = html.escape(whatif_plots.verdict(explanation))
        self.samples.value = whatif_plots.sides(self._listed(), self._uris)

    def _listed(self) -> whatif.Explanation:
        prompt, found = self.controls["prompt"].value, self.explanation
        mine = found.samples if prompt == "all" else found.samples[found.samples.prompt == prompt]
        return replace(found, samples=mine)

    def _knobs(self) -> dict[str, Any]:
        name = f"{FOLDER}/{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
        given = whatif.knobs(self.config) | {"run": name}
        return given | ({"policy": self.policy} if self.policy else {})

    def _use(self, button: ipywidgets.Button) -> None:
        try:
            given = self._knobs()
        except ValueError as error:
            self.chosen.value = note(str(error))
            return
        file = outputs_root() / f"{given['run']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, self.config.to_json() + "\n")
        lines = "\n\n".join(whatif.commands(given).values())
        self.chosen.value = f"{html.escape(str(file))}<pre style='white-space:pre-wrap'>{html.escape(lines)}</pre>"

    def _train(self, button: ipywidgets.Button) -> None:
        try:
            given = self._knobs()
        except ValueError as error:
            self.chosen.value = note(str(error))
            return
        self.train.disabled, self.stop.disabled = True, False
        self.training = Training(given, self._progress)

    def _progress(self, text: str, running: bool) -> None:
        self.chosen.value = html.escape(text)
        self.train.disabled, self.stop.disabled = running, not running

    def _stop(self, button: ipywidgets.Button) -> None:
        self.stop.disabled = True
        self.training.stop()


class Training:
    """A run of 03_speed_rl in a process of its own; it ends when the kernel does, and can be gone on with.

    `report(text, running)` is called every two seconds, and at the end.
    """

    def __init__(self, given: dict[str, Any], report: Callable[[str, bool], None]):
        self.folder, self._report, self._stopped = outputs_root() / given["run"], report, False
        self._resume = whatif.commands(given | {"resume": True})["speedrl_lab"]
        self.folder.mkdir(parents=True)
        words = [f"{name}={value if isinstance(value, str) else repr(value)}" for name, value in given.items()]
        command = [sys.executable, "-m", "speedrl_lab", "run", "03_speed_rl", *words, "--output", str(self.folder)]
        root = Path(whatif.__file__).resolve().parent.parent
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": path, "SPEEDRL_OUTPUTS": str(outputs_root())}
        with (self.folder / "log.txt").open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        self._report(f"starting {self.folder}", True)
        while True:
            try:
                self.process.wait(2)
                break
            except subprocess.TimeoutExpired:
                self._report(self.state(), not self._stopped)
        if self._stopped:
            self._report(f"stopped {self.state()}; go on: {self._resume}", False)
        else:
            end = "done" if self.process.returncode == 0 else "failed, see log.txt:"
            self._report(f"{end} {self.state()}", False)

    def state(self) -> str:
        """The folder and the last iteration in one line."""
        records = Run(self.folder, {}).records()
        if records.empty:
            return f"{self.folder}: no iteration yet"
        last = records.iloc[-1]
        return f"{self.folder}: iteration {last.iteration}, quality {last.quality:.3f}, steps {last.steps:.2f}"

    def stop(self) -> None:
        """Ask the process to end, kill it when it does not; its checkpoint stays."""
        self._stopped = True
        self.process.terminate()
        killer = threading.Timer(PATIENCE, self.process.kill)
        killer.daemon = True
        killer.start()

    def wait(self, seconds: float) -> int:
        """Exit status of the process, once the last report is out; raises subprocess.TimeoutExpired."""
        status = self.process.wait(seconds)
        self._watcher.join(seconds)
        return status


def note(text: str) -> str:
    """A warning as HTML."""
    return f'<div style="border-left:4px solid {plots.COLORS[1]};padding-left:8px">{html.escape(text)}</div>'


def controls(drawn: Rollout, config: TrainConfig) -> dict[str, Any]:
    """A widget for each thing that can be changed, set as `config` says."""
    style = {"style": {"description_width": "9em"}, "layout": WIDE}
    slow = {"continuous_update": False, "readout_format": ".2f", **style}
    names = [name for name in drawn.rewards if name != "speed"]
    made: dict[str, Any] = {
        f"weight: {name}": _slider(config.quality_weights.get(name, 0.0), 0, 3, 0.05, description=name, **slow)
        for name in names
    }
    made["speed_weight"] = _slider(config.speed_weight, 0, 3, 0.05, description="speed weight", **slow)
    for name in ("speed_form", "advantage_std", "low_quality"):
        made[name] = ipywidgets.Dropdown(
            options=options(name), value=getattr(config, name), description=name.replace("_", " "), **style
        )
    made["filter_quantile"] = _slider(config.filter_quantile or 0.25, 0.05, 0.95, 0.05,
                                      description="filter quantile", **slow)  # fmt: skip
    floors = config.quality_floor or {names[0]: round(float(drawn.rewards[names[0]].nanmedian()), 2)}
    floor, least = next(iter(floors.items()))
    made["floor: reward"] = ipywidgets.Dropdown(options=names, value=floor, description="floor on", **style)
    made["floor: value"] = ipywidgets.FloatText(least, step=0.02, description="floor, raw", **style)
    most = float(drawn.trajectory.forwards.max())
    made["target_steps"] = _slider(config.target_steps, 1, most, 0.25, description="target passes", **slow)
    prompts = ["all", *dict.fromkeys(drawn.prompts)]
    made["prompt"] = ipywidgets.Dropdown(options=prompts, description="list samples of", **style)
    return made


def _slider(value: float, low: float, high: float, step: float, **look: Any) -> ipywidgets.FloatSlider:
    return ipywidgets.FloatSlider(value, min=min(low, value), max=max(high, value), step=step, **look)


def options(name: str) -> tuple[str, ...]:
    """What a setting of TrainConfig may be."""
    return get_args(get_type_hints(TrainConfig)[name])


def enable(made: dict[str, Any]) -> None:
    """Disable controls that cannot act under the others, so that none is dead without saying so."""
    form = made["speed_form"].value
    for name, acts in {
        "floor: reward": form == "hinge",
        "floor: value": form == "hinge",
        "target_steps": form == "lagrangian",
        "filter_quantile": made["low_quality"].value != "off",
    }.items():
        made[name].disabled = not acts
    titles = {"multiplicative": "speed exponent", "lagrangian": "first multiplier"}
    made["speed_weight"].description = titles.get(form, "speed weight")


def settings(made: dict[str, Any], config: TrainConfig) -> TrainConfig:
    """`config` with what the controls say; weights are constant. Raises ValueError as `TrainConfig` does."""
    value = {name: control.value for name, control in made.items()}
    weights = {name[8:]: weight for name, weight in value.items() if name.startswith("weight: ")}
    hinged, filtered = value["speed_form"] == "hinge", value["low_quality"] != "off"
    return replace(
        config,
        quality_weights={name: weight for name, weight in weights.items() if weight} or weights,
        speed_weight=value["speed_weight"],
        speed_form=value["speed_form"],
        quality_floor={value["floor: reward"]: value["floor: value"]} if hinged else {},
        target_steps=value["target_steps"] if value["speed_form"] == "lagrangian" else config.target_steps,
        advantage_std=value["advantage_std"],
        low_quality=value["low_quality"],
        filter_quantile=value["filter_quantile"] if filtered else 0.0,
        weight_schedules={},
    )
