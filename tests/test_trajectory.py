"""The compact record rebuilds every state."""

import torch

from speedrl_lab.trajectory import Trajectory


def example() -> Trajectory:
    return Trajectory(
        tokens=torch.tensor([[1, 2, 0], [2, 0, 1]]),
        reveal_step=torch.tensor([[0, 2, 1], [1, 0, 0]], dtype=torch.int16),
        steps=torch.tensor([3, 2]),
        forwards=torch.tensor([3, 2]),
        log_prob=torch.zeros(2, 3),
        mask_id=9,
        order=torch.tensor([[0, 2, 1], [1, 2, 0]]),
    )


def test_states_show_what_was_known_before_each_step():
    trajectory = example()
    assert trajectory.state(0).tolist() == [[9, 9, 9], [9, 9, 9]]
    assert trajectory.state(1).tolist() == [[1, 9, 9], [9, 0, 1]]
    assert trajectory.state(2).tolist() == [[1, 9, 0], [2, 0, 1]]
    assert trajectory.state(3).tolist() == trajectory.tokens.tolist()


def test_each_position_is_revealed_once():
    trajectory = example()
    revealed = torch.stack([trajectory.revealed(step) for step in range(3)])
    assert revealed.sum(0).eq(1).all()
    assert trajectory.revealed(1).tolist() == [[False, False, True], [True, False, False]]


def test_selected_samples_keep_every_field():
    trajectory = example()
    assert len(trajectory) == 2
    for rows in (torch.tensor([1]), torch.tensor([False, True])):
        last = trajectory.select(rows)
        assert len(last) == 1 and last.mask_id == 9 and last.pace is None
        assert last.tokens.tolist() == [[2, 0, 1]] and last.order.tolist() == [[1, 2, 0]]
        assert last.steps.tolist() == [2] and last.state(1).tolist() == [[9, 0, 1]]
