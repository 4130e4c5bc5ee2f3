"""The training board: it steers a run without changing what is not asked for, draws rarely and logs plainly."""

import asyncio
import io
import json
import queue
from contextlib import closing
from dataclasses import asdict, replace
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_toy, share_of_twos, weights_of
from PIL import Image as Pillow

from speedrl_lab import board as boards
from speedrl_lab import board_plots, plots
from speedrl_lab.board import Board, Stopped
from speedrl_lab.config import SamplerConfig, TrainConfig
from speedrl_lab.rewards.speed import speed_reward
from speedrl_lab.rl import train
from speedrl_lab.runs import Run
from speedrl_lab.steering import changeable

PROMPTS = ["a dog", "two cats", "a frog left of a pig"]
REWARDS = {"twos": share_of_twos, "speed": speed_reward}
CONFIG = TrainConfig(
    sampler=SamplerConfig(steps=3, schedule="paced"), iterations=6, num_groups=2, group_size=4, learning_rate=0.02,
    warmup_iterations=2, quality_weights={"twos": 1.0}, speed_weight=0.3, save_every=4,
)  # fmt: skip


def record(iteration, **changes):
    rewards = {"clip": 0.5 + iteration / 100, "speed": -0.1}
    plain = {"steps": 4.0, "kl": 0.01, "diversity": 0.3, "seconds": 0.5, "warnings": []}
    return {"iteration": iteration, "rewards": rewards, **plain, **changes}


def opened(folder, config=CONFIG):
    return Run.open(folder, asdict(config), resume=True)


def logged(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def trained(folder, config=CONFIG, most=None, **given):
    """Weights after `most` iterations, all for None; the loop is closed as a `for` loop closes it."""
    generator = make_toy()
    with closing(train(generator, PROMPTS, REWARDS, config, opened(folder, config), **given)) as records:
        list(islice(records, most))
    return weights_of(generator)


def other_speed(iteration):
    return {"speed": 5.0, "kl": 1.0} if iteration == 3 else {}


# A weight that is changed while the run goes on.


def test_a_changed_weight_acts_from_its_iteration_on(tmp_path):
    plain, steered = trained(tmp_path / "plain"), trained(tmp_path / "steered", steer=other_speed)
    assert not torch.equal(plain, steered)
    before, after = logged(tmp_path / "plain"), logged(tmp_path / "steered")
    assert after[:2] == before[:2] and all(left != right for left, right in zip(before[2:], after[2:], strict=True))
    assert [row["weights"]["speed"] for row in after] == [0.3, 0.3, 5.0, 5.0, 5.0, 5.0]
    assert [row["weights"]["kl"] for row in after] == [0.02, 0.02, 1.0, 1.0, 1.0, 1.0]
    assert [row["changed"] for row in after] == [{}, {}, {"speed": 5.0, "kl": 1.0}, {}, {}, {}]


def test_a_changed_weight_equals_a_run_that_was_planned_so(tmp_path):
    planned = replace(CONFIG, weight_schedules={"twos": [[1, 1.0], [2, -2.0]]})
    steered = trained(tmp_path / "steered", steer=lambda iteration: {"twos": -2.0} if iteration == 3 else {})
    assert torch.equal(trained(tmp_path / "planned", planned), steered)


@pytest.mark.parametrize("most", [3, 5])
def test_a_changed_weight_stays_after_a_stop_bit_for_bit(tmp_path, most):
    whole = trained(tmp_path / "whole", steer=other_speed)
    trained(tmp_path / "parts", most=most, steer=other_speed)
    assert torch.equal(trained(tmp_path / "parts"), whole)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_a_changed_weight_is_saved_before_it_acts(tmp_path):
    """A run that is killed in the very next iteration goes on with the weight, and tells of it."""
    whole = trained(tmp_path / "whole", steer=other_speed)
    scored = []

    def killed(images, prompts, trajectory):
        scored.append(len(images))
        if len(scored) == 3:
            raise KeyboardInterrupt
        return share_of_twos(images, prompts, trajectory)

    run = opened(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        list(train(make_toy(), PROMPTS, {**REWARDS, "twos": killed}, CONFIG, run, steer=other_speed))
    assert len(logged(tmp_path / "parts")) == 2
    assert torch.equal(trained(tmp_path / "parts"), whole)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_only_weights_that_act_can_be_changed(tmp_path):
    assert changeable(CONFIG) == ["twos", "speed", "kl"]
    assert changeable(replace(CONFIG, speed_form="lagrangian")) == ["twos", "kl"]
    assert changeable(replace(CONFIG, sampler=SamplerConfig(steps=3), speed_weight=0.0)) == ["twos", "kl"]
    assert changeable(replace(CONFIG, trained="schedule")) == ["twos", "speed"]
    for weights, message in (
        ({"sped": 1.0}, "weight 'sped' cannot be changed in this run; nearest: 'speed'"),
        ({"kl": -1.0}, "weight kl=-1.0: expected a finite number of at least 0"),
        ({"twos": float("nan")}, "weight twos=nan: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            list(train(make_toy(), PROMPTS, REWARDS, CONFIG, steer=lambda iteration, weights=weights: weights))


# Leaving the loop.


@pytest.mark.parametrize("most", [1, 3, 5])
def test_leaving_the_loop_saves_the_state(tmp_path, most):
    trained(tmp_path / "parts", most=most)
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["iteration"] == most
    assert len(logged(tmp_path / "parts")) == most
    assert torch.equal(trained(tmp_path / "parts"), trained(tmp_path / "whole"))


def test_a_loop_that_is_left_late_does_not_overwrite_what_came_after(tmp_path):
    folder = tmp_path / "run"
    forgotten = train(make_toy(), PROMPTS, REWARDS, CONFIG, opened(folder))
    list(islice(forgotten, 3))
    whole = trained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    forgotten.close()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert torch.equal(whole, trained(tmp_path / "whole"))


def test_a_run_folder_that_was_removed_stays_removed(tmp_path):
    records = train(make_toy(), PROMPTS, REWARDS, CONFIG, opened(tmp_path / "run"))
    next(records)
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    (tmp_path / "run").rmdir()
    records.close()
    assert not (tmp_path / "run").exists()


# The board with its widgets, as in JupyterLab.


class Handle:
    def __init__(self, first):
        self.shown = [first]

    def update(self, content):
        self.shown.append(content)


@pytest.fixture
def screen(monkeypatch):
    """What is displayed, each with its updates, as if a person were looking."""
    handles = []

    def display(content, display_id):
        assert display_id
        handles.append(Handle(content))
        return handles[-1]

    monkeypatch.setattr(boards, "get_ipython", object)
    monkeypatch.setattr(boards, "display", display)
    monkeypatch.setattr(boards, "has_front_end", lambda: True)
    return handles


def on_board(folder, act=None, config=CONFIG, generator=None):
    """Train with a board; `act(board, record)` is called after each iteration. Returns weights and board."""
    generator, run = generator or make_toy(), opened(folder, config)
    board = Board(config, run, generator, PROMPTS)

    def acting(records):
        with closing(records):
            for done in records:
                if act is not None:
                    act(board, done)
                yield done

    asyncio.run(board.show(acting(train(generator, PROMPTS, REWARDS, config, run, steer=board.steer))))
    return weights_of(generator), board


def test_looking_does_not_change_the_run(tmp_path, screen):
    weights, board = on_board(tmp_path / "seen")
    assert torch.equal(weights, trained(tmp_path / "whole"))
    assert logged(tmp_path / "seen") == logged(tmp_path / "whole")
    assert sorted(board.moments) == [1, 2, 3, 4, 5, 6]
    (handle,) = screen
    assert handle.shown[0] is board.controls.box and handle.shown[-1].data[:4] == b"\x89PNG" and len(handle.shown) == 2


def test_pause_holds_and_changes_nothing(tmp_path, screen, monkeypatch):
    board, seen = [], []

    async def nap(seconds):
        controls = board[0].controls
        if controls.paused:
            seen.append((controls.pause.description, len(board[0].records)))
        if len(seen) == 3:
            controls.go_on.click()

    monkeypatch.setattr(boards.asyncio, "sleep", nap)

    def act(shown, done):
        board[:] = [shown]
        if done["iteration"] == 2:
            shown.controls.pause.click()
            assert shown.controls.pause.description == "Pausing"
            assert shown.controls.pause.disabled and not shown.controls.go_on.disabled

    weights, _ = on_board(tmp_path / "paused", act)
    assert seen == [("Pausing", 2), ("Paused", 2), ("Paused", 2)]
    assert torch.equal(weights, trained(tmp_path / "whole"))
    assert logged(tmp_path / "paused") == logged(tmp_path / "whole")


def test_stop_saves_and_go_on_ends_as_if_never_stopped(tmp_path, screen):
    folder = tmp_path / "run"

    def act(board, done):
        if done["iteration"] == 3:
            board.controls.stop.click()

    with pytest.raises(Stopped, match="Stopped after iteration 3 of 6") as stopped:
        on_board(folder, act)
    assert stopped.value._render_traceback_() == [str(stopped.value)]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"] == len(logged(folder)) == 3
    assert not (folder / "policy.safetensors").exists()
    weights, board = on_board(folder)
    assert torch.equal(weights, trained(tmp_path / "whole"))
    assert logged(folder) == logged(tmp_path / "whole") and len(board.records) == 6
    assert sorted(board.moments) == [1, 2, 3, 4, 5, 6]


def test_a_weight_asked_for_after_the_last_iteration_is_not_lost_in_silence(tmp_path, screen, capsys):
    def act(board, done):
        if done["iteration"] == 6:
            board.controls.weights["speed"].value = 3.0

    on_board(tmp_path / "run", act)
    assert "speed = 3 was asked for after this cell's last iteration: enter it again" in capsys.readouterr().out
    assert not any(record["changed"] for record in logged(tmp_path / "run"))


def test_stop_ends_a_pause(tmp_path, screen, monkeypatch):
    def act(board, done):
        board.controls.pause.click()

        async def nap(seconds):
            if board.controls.pause.description == "Paused":
                board.controls.stop.click()

        monkeypatch.setattr(boards.asyncio, "sleep", nap)

    with pytest.raises(Stopped, match="after iteration 1 of 6"):
        on_board(tmp_path / "run", act)


@pytest.mark.parametrize("name", ["twos", "speed", "kl"])
def test_every_field_changes_its_weight_from_the_next_iteration(tmp_path, screen, name):
    def act(board, done):
        if done["iteration"] == 2:
            board.controls.weights[name].value = 4.0

    _, board = on_board(tmp_path / "run", act)
    rows = logged(tmp_path / "run")
    assert [row["changed"] for row in rows] == [{}, {}, {name: 4.0}, {}, {}, {}]
    assert [row["weights"][name] == 4.0 for row in rows] == [False, False, True, True, True, True]
    assert f"iteration 3: {name} = 4" in board.controls.notes.value
    assert board_plots.changes(board.records) == {3: {name: 4.0}}
    again = Board(CONFIG, opened(tmp_path / "run"))
    assert again.controls.weights[name].value == 4.0, "the field says what is in force"


def test_a_weight_that_cannot_be_is_refused_and_training_goes_on(tmp_path, screen):
    def act(board, done):
        if done["iteration"] == 2:
            board.controls.weights["kl"].value = -1.0
            assert "weight kl=-1.0: expected a finite number of at least 0" in board.controls.notes.value
            assert board.controls.weights["kl"].value == CONFIG.kl_weight, "the field says what is in force"

    weights, _ = on_board(tmp_path / "run", act)
    assert torch.equal(weights, trained(tmp_path / "whole"))


@pytest.mark.parametrize("looking", [True, False])
def test_an_interrupt_leaves_the_picture_and_the_state(tmp_path, screen, monkeypatch, looking):
    """ipykernel cancels the task of an asynchronous cell, which is felt where it awaits."""
    monkeypatch.setattr(boards, "has_front_end", lambda: looking)

    def act(board, done):
        if done["iteration"] == 3:
            asyncio.current_task().cancel()

    with pytest.raises(asyncio.CancelledError):
        on_board(tmp_path / "run", act)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["iteration"] == 3
    assert screen[0].shown[-1].data[:4] == b"\x89PNG"


# Samples of fixed prompts over time.


def test_fixed_prompts_are_drawn_now_and_then_and_kept(tmp_path, screen):
    config = replace(CONFIG, iterations=20)
    _, board = on_board(tmp_path / "run", config=config)
    assert sorted(board.moments) == [1, *range(2, 21, 2)]
    kept = boards.read_moments(tmp_path / "run" / "samples", PROMPTS)
    assert sorted(kept) == sorted(board.moments)
    for iteration, (images, steps) in kept.items():
        assert (images - board.moments[iteration][0]).abs().max() <= 0.5 / 255 + 1e-6
        assert steps == board.moments[iteration][1] and images.shape == (3, 3, 2, 2)
    assert boards.read_moments(tmp_path / "run" / "samples", PROMPTS[::-1]) == {}
    assert not (tmp_path / "run" / "samples" / "partial").exists()
    figure = board_plots.film(kept, PROMPTS)
    titles = [text.get_text() for text in figure.axes[0].texts if "iteration" in text.get_text()]
    assert titles[0] == "iteration 1" and titles[-1] == "iteration 20" and len(titles) == 9


def test_many_prompts_are_thinned_out():
    board = Board(CONFIG, prompts=[str(number) for number in range(10)])
    assert board.prompts == ["0", "2", "4", "6"]


# Pictures and lines.


def test_curves_have_bands_and_mark_changes():
    rows = [
        record(number, rewards_std={"clip": 0.1, "speed": 0.2}, forwards=80 + number, clip_fraction=0.0,
               weights={"clip": 1.0, "speed": 0.5}, changed={"speed": 0.5} if number == 7 else {})
        for number in range(1, 13)
    ]  # fmt: skip
    figure = board_plots.curves(rows, samples=8)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "reward: clip: 0.575", "reward: speed: -0.1", "steps per image: 4", "passes per image: 10.9",
        "KL (nats per token): 0.01", "clipped (share of ratios): 0", "diversity (RMS pixels): 0.3", "weights",
    ]  # fmt: skip
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(0.51 - 0.1) and band.max() == pytest.approx(0.575 + 0.1)
    assert all(any(list(line.get_xdata()) == [7, 7] for line in axes.lines) for axes in figure.axes)


def test_status_tells_cost_so_far_and_to_come():
    rows = [record(number, seconds=30.0, passes=1500) for number in range(1, 5)]
    text = boards.status(rows, TrainConfig(iterations=10))
    assert text.startswith("iteration 4 of 10 · 2:00 used, about 3:00 to go (until ")
    assert text.endswith("6.0 of about 15.0 thousand network passes")
    assert boards.clock(3661) == "1:01:01"


def test_without_a_notebook_it_prints_about_twenty_lines(capsys):
    board = Board(TrainConfig(iterations=100))
    for iteration in range(1, 101):
        board.update(record(iteration))
    board.close()
    lines = capsys.readouterr().out.splitlines()
    assert 20 <= len(lines) <= 22 and board.drawings == 0 and len(board.records) == 100 and board.controls is None
    assert lines[-1] == (
        "iteration 100 of 100: clip 1.500, speed -0.100, steps 4.00, KL 0.0100, diversity 0.300, 0.5 s"
    )


def test_it_goes_on_from_earlier_records(tmp_path):
    run = Run.open(tmp_path / "run", {})
    for iteration in (1, 2, 3):
        run.log(record(iteration, changed={"speed": 2.0} if iteration == 2 else {}))
    board = Board(TrainConfig(iterations=100), run)
    board.update(record(3, steps=2.0))
    board.update(record(4))
    assert [row["iteration"] for row in board.records] == [1, 2, 3, 4] and board.records[2]["steps"] == 2.0
    assert board_plots.changes(board.records) == {2: {"speed": 2.0}}
    clip = board_plots.curves(board.records, samples=1).axes[0].lines[0]
    assert np.allclose(clip.get_ydata(), [0.51, 0.52, 0.53, 0.54])


def test_each_kind_of_warning_is_said_once(capsys):
    board = Board(TrainConfig(iterations=100))
    for iteration in range(1, 10):
        board.update(record(iteration, warnings=[f"diversity 0.{iteration} is low", "reward 'speed' is silent"]))
    printed = capsys.readouterr().out
    assert printed.count("is low") == 1 and printed.count("is silent") == 1


def test_it_draws_at_most_once_a_second_and_in_place(screen, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(boards, "has_front_end", lambda: False)
    monkeypatch.setattr(boards.time, "monotonic", lambda: now[0])
    board = Board(TrainConfig(iterations=30))
    for iteration in range(1, 31):
        board.update(record(iteration))
        now[0] += 0.1
    assert board.drawings == 3
    board.close()
    (handle,) = screen
    assert board.drawings == len(handle.shown) == 4
    assert handle.shown[0].data != handle.shown[-1].data


def test_a_heavy_picture_loses_colors_but_not_its_size():
    rng = np.random.default_rng(0)
    heavy = plots.png(plots.image_grid(torch.from_numpy(rng.random((24, 3, 64, 64), dtype=np.float32))))
    stacked = board_plots.stacked([heavy, heavy])
    assert len(heavy) > board_plots.MOST_BYTES and len(stacked) < len(heavy)
    one, two = (Pillow.open(io.BytesIO(file)) for file in (heavy, stacked))
    assert two.size == (one.width, 2 * one.height) and (one.mode, two.mode) == ("RGBA", "P")


# The kernel.


def test_a_front_end_names_its_cells(monkeypatch):
    for metadata, expected in (({"cellId": "7"}, True), ({}, False), (None, False)):
        kernel = SimpleNamespace(get_parent=lambda metadata=metadata: {"metadata": metadata})
        monkeypatch.setattr(boards, "get_ipython", lambda kernel=kernel: SimpleNamespace(kernel=kernel))
        assert boards.has_front_end() == expected
    monkeypatch.setattr(boards, "get_ipython", lambda: None)
    assert not boards.has_front_end()


def test_events_of_widgets_are_handled_and_the_rest_stays_in_order(monkeypatch):
    """ipykernel 6: a cell that is queued behind a busy one is left alone."""
    waiting, handled = queue.Queue(), []
    messages = [(1, "shell", ["comm_msg 1"]), (2, "shell", ["execute_request"]), (3, "other", ["comm_msg 2"]),
                (4, "shell", ["comm_msg 3"]), (5, "shell", ["comm_info_request"])]  # fmt: skip
    for message in messages:
        waiting.put(message)
    session = SimpleNamespace(
        feed_identities=lambda frames, copy: ([], frames),
        deserialize=lambda parts, content, copy: {"header": {"msg_type": parts.split()[0]}, "is": parts},
    )
    kernel = SimpleNamespace(
        msg_queue=waiting, session=session, dispatch_shell="shell", shell_stream=None,
        comm_manager=SimpleNamespace(comm_msg=lambda stream, identities, message: handled.append(message["is"])),
    )  # fmt: skip
    monkeypatch.setattr(boards, "get_ipython", lambda: SimpleNamespace(kernel=kernel))
    boards.widget_events()
    assert handled == ["comm_msg 1", "comm_msg 3"]
    assert list(waiting.queue) == [messages[1], messages[2], messages[4]]
    monkeypatch.setattr(boards, "get_ipython", lambda: SimpleNamespace(kernel=SimpleNamespace()))
    boards.widget_events()
