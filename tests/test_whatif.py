"""What if: the explorer says what training would do, and every control changes something."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_toy, share_of_twos

from speedrl_lab import advantage, explorer, notebooks, trash, whatif, whatif_plots
from speedrl_lab.config import RunConfig, SamplerConfig, TrainConfig
from speedrl_lab.learner import Rollout, weights_at
from speedrl_lab.rewards.example import colorfulness
from speedrl_lab.rewards.speed import speed_reward
from speedrl_lab.rl import weigh
from speedrl_lab.runs import Run
from speedrl_lab.trajectory import Trajectory

PACED = SamplerConfig(steps=8, order="halton", schedule="paced")
G = 6


def made_up(groups=4, equal_steps=False, seed=0):
    """A rollout of 16 tokens whose rewards and steps are random numbers."""
    rng = torch.Generator().manual_seed(seed)
    count = groups * G
    steps = torch.full((count,), 4) if equal_steps else torch.randint(1, 9, (count,), generator=rng)
    trajectory = Trajectory(
        tokens=torch.randint(0, 9, (count, 16), generator=rng), reveal_step=torch.zeros(count, 16, dtype=torch.int16),
        steps=steps, forwards=steps.clone(), log_prob=torch.zeros(count, 16), mask_id=9, sampler=PACED,
    )  # fmt: skip
    prompts = [f"a dog {group}" for group in range(groups) for _ in range(G)]
    images = torch.rand(count, 3, 8, 8, generator=rng)
    rewards = {name: torch.randn(count, generator=rng) for name in ("clip", "coherence")}
    rewards["clip"] = rewards["clip"] + steps / 8  # quality costs steps
    return Rollout(prompts, trajectory, images, rewards | {"speed": speed_reward(images, prompts, trajectory)})


def settings(**changes):
    known = {"sampler": PACED, "group_size": G, "quality_weights": {"clip": 1.0}, "speed_weight": 0.5}
    return TrainConfig(**known | changes)


def run_config(**changes):
    return replace(RunConfig.from_flat("emoji"), train=settings(**changes))


FORMS = {
    "additive": {},
    "multiplicative": {"speed_form": "multiplicative", "speed_weight": 1.5},
    "hinge": {"speed_form": "hinge", "quality_floor": {"clip": 0.3}},
    "drop": {"low_quality": "drop", "filter_quantile": 0.4, "advantage_std": "group"},
    "clip": {"low_quality": "clip", "filter_quantile": 0.4, "advantage_std": "none"},
}


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_advantages_are_those_of_training(changes):
    drawn, config = made_up(), settings(**changes)
    found, trained = whatif.explain(drawn, config), weigh(drawn, config, weights_at(config, 0))
    assert torch.equal(found.advantages.advantage, trained.advantage)
    assert torch.equal(found.advantages.kept, trained.kept)
    np.testing.assert_allclose(found.samples.advantage, trained.advantage)
    table = found.weights.set_index("reward")
    for name, value in trained.effective_weights.items():
        assert table.effective[name] == pytest.approx(value)


@pytest.mark.parametrize("name", ["additive", "multiplicative"])
def test_iso_lines_are_levels_of_the_advantage(name):
    drawn, config = made_up(), settings(**FORMS[name], advantage_std="none")
    found = whatif.explain(drawn, config)
    total = whatif.total_reward(found.advantages.quality, drawn.trajectory.forwards, drawn, config)
    torch.testing.assert_close(
        advantage.group_centered(total, G), found.advantages.advantage, rtol=1e-4, atol=1e-5
    )  # fmt: skip


def test_iso_lines_of_the_hinge_hold_above_the_floor():
    drawn = made_up()
    config = settings(speed_form="hinge", quality_floor={"clip": -50.0}, advantage_std="none")
    quality = whatif.explain(drawn, config).advantages.quality
    total = whatif.total_reward(quality, drawn.trajectory.forwards, drawn, config)
    found = whatif.explain(drawn, replace(config, speed_form="additive", quality_floor={}))
    torch.testing.assert_close(advantage.group_centered(total, G), found.advantages.advantage, rtol=1e-4, atol=1e-5)


def test_lagrangian_takes_the_weight_of_the_second_iteration():
    drawn = made_up()
    config = settings(speed_form="lagrangian", target_steps=2.0, multiplier_rate=0.1)
    excess = float(drawn.trajectory.forwards.float().mean()) / 2 - 1
    assert whatif.weights_now(drawn, config).speed == pytest.approx(0.5 + 1.1 * excess)


def test_filtered_samples_say_why():
    drawn = made_up()
    for kind, fate in (("drop", "dropped"), ("clip", "clipped")):
        samples = whatif.explain(drawn, settings(low_quality=kind, filter_quantile=0.5)).samples
        filtered = samples[samples.fate == fate]
        assert len(filtered) and filtered.why.str.contains("below the 0.5 quantile").all()
        medians = samples.groupby("group").quality.transform("median")
        assert (filtered.quality < medians.loc[filtered.index]).all() and (filtered.advantage <= 0).all()
    blind = made_up()
    blind.rewards["clip"][3] = torch.nan
    samples = whatif.explain(blind, settings()).samples
    assert samples.fate[3] == "dropped" and "could score" in samples.why[3] and (samples.fate == "dropped").sum() == 1


def test_below_the_floor_speed_does_not_count():
    samples = whatif.explain(made_up(), settings(**FORMS["hinge"])).samples
    assert (samples.why.str.contains("floor") == (samples["clip"] < 0.3)).all()


def test_warns_where_speed_cannot_act():
    fixed = whatif.explain(made_up(equal_steps=True), settings())
    assert len(fixed.warnings) == 1 and "take 4 steps" in fixed.warnings[0] and "paced" in fixed.warnings[0]
    assert not fixed.weights.set_index("reward").acts["speed"]
    assert whatif.explain(made_up(), settings()).warnings == []
    assert whatif.explain(made_up(equal_steps=True), settings(speed_weight=0.0)).warnings == []
    far = settings(speed_form="hinge", quality_floor={"clip": 99.0})
    assert any("No sample reaches" in warning for warning in whatif.explain(made_up(), far).warnings)


def test_refuses_what_the_rollouts_lack():
    with pytest.raises(ValueError, match="no reward 'novelty', only clip, coherence, speed"):
        whatif.explain(made_up(), settings(quality_weights={"novelty": 1.0}))
    with pytest.raises(ValueError, match="group_size=7"):
        whatif.explain(made_up(), settings(group_size=7))


def test_draw_leaves_the_generator_alone():
    generator = make_toy()
    rewards = {"twos": share_of_twos, "speed": speed_reward}
    config = TrainConfig(
        sampler=replace(PACED, steps=4), num_groups=2, group_size=4, quality_weights={"twos": 1.0}, speed_weight=0.3
    )
    drawn = whatif.draw(generator, ["a", "bc"], rewards, config)
    assert generator.pace is None and len(drawn.prompts) == 8 and drawn.rewards["twos"].shape == (8,)
    assert whatif.explain(drawn, config).samples.steps.between(1, 4).all()


def test_rollouts_survive_the_file(tmp_path):
    drawn, config = made_up(), settings(**FORMS["hinge"])
    path = whatif.write_rollouts(tmp_path / "rollouts.pt", drawn, config)
    again, read = whatif.read_rollouts(tmp_path)
    assert read == config and again.prompts == drawn.prompts
    pairs = [(again.rewards[name], drawn.rewards[name]) for name in drawn.rewards]
    names = ("tokens", "reveal_step", "steps", "forwards")
    pairs += [(getattr(again.trajectory, name), getattr(drawn.trajectory, name)) for name in names]
    assert all(torch.equal(left, right) for left, right in pairs)
    assert float((again.images - drawn.images).abs().max()) <= 0.5 / 255 + 1e-6
    before, after = (whatif.explain(rollout, config).advantages for rollout in (drawn, again))
    assert torch.equal(before.advantage, after.advantage)
    with pytest.raises(FileExistsError, match="not overwritten"):
        whatif.write_rollouts(path, drawn, config)


def test_rollouts_of_large_pictures_are_small(tmp_path):
    drawn = replace(made_up(), images=torch.rand(4 * G, 3, 256, 128))
    assert whatif.thumbnails(drawn.images).shape == (4 * G, 3, 64, 32)
    path = whatif.write_rollouts(tmp_path / "rollouts.pt", drawn, settings())
    assert path.stat().st_size < 4 * G * 3 * 64 * 32 + 20_000


def test_draw_takes_any_iteration_and_never_a_practised_one():
    config = TrainConfig(
        sampler=replace(PACED, steps=4), num_groups=2, group_size=4, quality_weights={"twos": 1.0}, speed_weight=0.3,
        practice_steps=[2],
    )  # fmt: skip
    rewards = {"twos": share_of_twos, "speed": speed_reward}
    drawn = [whatif.draw(make_toy(pace=True), ["a", "bc"], rewards, config, iteration) for iteration in (0, 1)]
    assert all(rollout.trajectory.sampler.schedule == "paced" for rollout in drawn)
    assert not torch.equal(drawn[0].trajectory.tokens, drawn[1].trajectory.tokens)


def test_a_run_keeps_its_rollouts_and_can_be_deleted(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path))
    run = Run.open("group/mine", {"seed": 0})
    whatif.write_rollouts(run.path / whatif.FILE, made_up(), settings())
    assert whatif.read_rollouts(tmp_path / "group" / "mine")[1] == settings()
    assert trash.foreign(run.path) is None


def test_rollouts_that_are_not_there_name_who_leaves_them_and_the_nearest(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path))
    Run.open("empty", {"seed": 0})
    said = "run 'empty' holds no rollouts.pt; 03_speed_rl leaves one where it ends; no run here has one yet"
    with pytest.raises(FileNotFoundError, match=f"^{said}$"):
        whatif.read_rollouts(tmp_path / "empty")
    whatif.write_rollouts(Run.open("mine", {"seed": 0}).path / whatif.FILE, made_up(), settings())
    with pytest.raises(FileNotFoundError, match="^there is no run 'mint'; .*; nearest that has one: 'mine'$"):
        whatif.read_rollouts(tmp_path / "mint")


@pytest.mark.parametrize("content", [b"no", None], ids=["foreign", "other"])
def test_broken_files_are_one_line(tmp_path, content):
    path = tmp_path / "rollouts.pt"
    path.write_bytes(content) if content else torch.save({"version": 99}, path)
    with pytest.raises(ValueError, match="truncated|no rollouts of version") as caught:
        whatif.read_rollouts(path)
    assert "\n" not in str(caught.value)


def test_commands_say_what_differs_from_the_preset():
    config = run_config(group_size=8, speed_weight=0.25)
    given = whatif.knobs(config)
    assert given == {"preset": "emoji", "iterations": 100, "quality_weights": {"clip": 1.0}, "speed_weight": 0.25,
                     "kl_weight": 0.02, "kl_estimator": "cross_entropy"}  # fmt: skip
    assert RunConfig.from_flat(**given) == config
    lines = whatif.commands(given)
    assert "speed_weight=0.25" in lines["speedrl_lab"] and "papermill --engine speedrl" in lines["papermill"]
    with pytest.raises(ValueError, match="'redness' is your own"):
        whatif.knobs(run_config(group_size=8, quality_weights={"redness": 1.0}))
    with pytest.raises(ValueError, match="no parameter 'clip_range'"):
        whatif.knobs(run_config(group_size=8, clip_range=0.1))


def test_every_setting_of_the_explorer_reaches_the_notebook():
    names = {"quality_weights", "speed_weight", "speed_form", "quality_floor", "target_steps", "advantage_std",
             "low_quality", "filter_quantile"}  # fmt: skip
    assert names - notebooks.parameters("03_speed_rl").keys() == set()


def test_colorfulness_is_zero_for_gray_and_grows_with_color():
    gray, red = torch.rand(1, 1, 8, 8).expand(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)
    red[:, 0, :4] = 1.0
    values = colorfulness(torch.cat([gray, red / 2, red]), [""] * 3, None)
    assert float(values[0]) < 1e-6 and 0 < float(values[1]) < float(values[2])


# The widget: every control is moved, and the outcome must change.

MOVES = {
    "weight: clip": ({}, 0.3),
    "weight: coherence": ({}, 1.0),
    "speed_weight": ({}, 2.0),
    "speed_form": ({}, "multiplicative"),
    "advantage_std": ({}, "group"),
    "low_quality": ({}, "drop"),
    "filter_quantile": ({"low_quality": "drop", "filter_quantile": 0.2}, 0.7),
    "floor: value": (FORMS["hinge"], 1.2),
    "floor: reward": (FORMS["hinge"], "coherence"),
    "target_steps": ({"speed_form": "lagrangian"}, 1.0),
}


def outcome(board):
    found = board.explanation.advantages
    return torch.cat([found.advantage, found.kept.float()])


@pytest.mark.parametrize("name", MOVES)
def test_no_control_is_dead(name):
    before, value = MOVES[name]
    board = explorer.Explorer(made_up(), run_config(quality_weights={"clip": 1.0, "coherence": 0.4}, **before))
    seen, pictures = outcome(board), (board._cloud.value, board.samples.value)
    assert not board.controls[name].disabled
    board.controls[name].value = value
    assert not torch.equal(outcome(board), seen)
    assert board._cloud.value != pictures[0] and board.samples.value != pictures[1]


def test_every_control_has_a_move():
    board = explorer.Explorer(made_up(), run_config())
    assert set(board.controls) == {*MOVES, "prompt"}


def test_the_prompt_chooses_whose_samples_are_listed():
    board = explorer.Explorer(made_up(), run_config())
    assert "a dog 1" in board.samples.value or "a dog 2" in board.samples.value
    board.controls["prompt"].value = "a dog 3"
    assert "a dog 3" in board.samples.value and "a dog 1" not in board.samples.value


def test_controls_that_cannot_act_are_disabled():
    board = explorer.Explorer(made_up(), run_config())
    names = ("floor: value", "floor: reward", "target_steps", "filter_quantile")
    assert [board.controls[name].disabled for name in names] == [True] * 4
    board.controls["speed_form"].value = "hinge"
    board.controls["low_quality"].value = "clip"
    assert [board.controls[name].disabled for name in names] == [False, False, True, False]
    board.controls["speed_form"].value = "lagrangian"
    assert [board.controls[name].disabled for name in names] == [True, True, False, False]


def test_a_combination_that_no_training_takes_is_said():
    board = explorer.Explorer(made_up(), run_config())
    board.controls["speed_form"].value = "multiplicative"
    board.controls["speed_weight"].value = 0.0
    assert "needs a speed_weight above 0" in board.warnings.value
    board.controls["speed_weight"].value = 1.0
    assert board.warnings.value == ""


def test_fixed_steps_warn_on_the_board():
    board = explorer.Explorer(made_up(equal_steps=True), run_config())
    assert "cannot act" in board.warnings.value


def test_use_these_writes_a_config_and_a_command(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path))
    board = explorer.Explorer(made_up(), run_config())
    board.controls["speed_weight"].value = 1.5
    board.use.click()
    (file,) = (tmp_path / "02_rewards").glob("*.json")
    assert json.loads(file.read_text())["speed_weight"] == 1.5
    assert RunConfig.from_flat(**json.loads(file.read_text())) == board.config
    assert "speed_weight=1.5" in board.chosen.value and "run=02_rewards/" in board.chosen.value


class Sleeper(explorer.subprocess.Popen):
    """A process that only waits, in place of a training."""

    def __init__(self, command, **rest):
        self.command = command
        super().__init__([command[0], "-c", "import time; time.sleep(60)"], **rest)


def test_training_is_a_run_that_can_be_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRL_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(explorer.subprocess, "Popen", Sleeper)
    board = explorer.Explorer(made_up(), run_config(speed_weight=0.75), policy="mine.safetensors")
    board.train.click()
    training = board.training
    assert training.folder.is_dir() and training.folder.parent == tmp_path / "02_rewards"
    assert {"03_speed_rl", "speed_weight=0.75", "policy=mine.safetensors"} <= {*training.process.command}
    assert board.train.disabled and not board.stop.disabled
    board.stop.click()
    assert training.wait(20) < 0
    assert "stopped" in board.chosen.value and "resume=True" in board.chosen.value
    assert not board.train.disabled and board.stop.disabled


def test_figures_draw_whatever_the_explanation_says():
    drawn = made_up()
    for changes in [*FORMS.values(), {"speed_form": "lagrangian"}, {"speed_weight": 0.0}]:
        config = settings(**changes)
        found = whatif.explain(drawn, config)
        assert len(whatif_plots.weight_bars(found).axes) == 1
        assert len(whatif_plots.cloud(found, drawn, config).axes[0].collections) >= 3
        assert "Winners take" in whatif_plots.verdict(found)
