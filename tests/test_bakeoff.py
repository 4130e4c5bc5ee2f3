"""The bake-off of estimators against slow loops over the real network, and what it must find."""

from functools import partial

import numpy as np
import pytest
import torch

from speedrl_lab import bakeoff, estimator_plots
from speedrl_lab.config import SamplerConfig
from speedrl_lab.enumeration import enumerate_trajectories, expected
from speedrl_lab.generator import StepInfo
from speedrl_lab.generators.tiny import make_tiny
from speedrl_lab.likelihood import trajectory_log_prob
from speedrl_lab.objective import forward_kl, kl_penalty, reverse_kl

PROMPT = "a dog"
GRID = (1, 3)
HALTON = SamplerConfig(steps=3, order="halton", schedule="linear")
CONFIDENT = SamplerConfig(steps=2, order="confidence", schedule="linear")
reward = partial(bakeoff.equal_neighbors, grid=GRID)


def tiny(seed=0):
    return make_tiny(GRID, codes=2, seed=seed)


def errors(sampler, masks=20, seed=0):
    return bakeoff.likelihood_errors(tiny(), PROMPT, sampler, reward, masks, seed).set_index("estimator")


def flat(parts):
    return torch.cat([part.flatten() for part in parts]).double()


@pytest.mark.parametrize("sampler, name", [(HALTON, "replay"), (CONFIDENT, "Plackett-Luce")])
def test_the_exact_ones_are_unbiased_and_no_other_is(sampler, name):
    table = errors(sampler)
    exact, others = table.loc[name], table.drop(name)
    assert abs(exact.bias) < 1e-5 and exact["std"] == 0 and exact.correlation > 1 - 1e-9
    assert exact.gradient_bias < 1e-3 and exact.cosine > 1 - 1e-6 and exact.gradient_std > 0
    assert (others.gradient_bias > 0.01).all() and (others.bias.abs() > 0.01).all()


@pytest.mark.parametrize(
    "sampler, name, estimator, order_factor",
    [
        (HALTON, "replay", "replay", "exact"),
        (HALTON, "random_mask", "random_mask", "exact"),
        (HALTON, "coupled", "coupled", "exact"),
        (HALTON, "critical", "critical", "exact"),
        (CONFIDENT, "Plackett-Luce", "replay", "exact"),
        (CONFIDENT, "token only", "replay", "token_only"),
    ],
)
def test_a_row_is_what_a_loop_of_backward_passes_gives(sampler, name, estimator, order_factor):
    seeds, generator = range(4, 6), tiny()
    weights = list(generator.policy.parameters())
    outcomes = enumerate_trajectories(generator, PROMPT, sampler)
    chances, rewards = outcomes.log_prob.detach().exp(), reward(outcomes.trajectory.tokens)
    truth = (outcomes.log_prob - outcomes.constant).detach()
    advantage = rewards - (chances * rewards).sum()
    samples, square, values = 0.0, 0.0, []
    for seed in seeds:
        estimate = trajectory_log_prob(
            generator, [PROMPT] * len(outcomes), outcomes.trajectory, sampler, estimator, order_factor, seed
        )
        values.append(estimate.detach().double())
        for row in range(len(outcomes)):
            one = flat(torch.autograd.grad(estimate[row], weights, retain_graph=True)) * advantage[row]
            samples, square = samples + chances[row] * one / 2, square + chances[row] * one.square().sum() / 2
    exact = flat(torch.autograd.grad(expected(outcomes, rewards), weights))
    values = torch.stack(values)
    got = (
        bakeoff.likelihood_errors(generator, PROMPT, sampler, reward, masks=2, seed=4).set_index("estimator").loc[name]
    )
    assert got.gradient_bias == pytest.approx(float((samples - exact).norm() / exact.norm()), abs=1e-5)
    assert got.cosine == pytest.approx(float(torch.cosine_similarity(samples, exact, dim=0)), abs=1e-5)
    variance = float(square - samples.square().sum())
    assert got.gradient_std == pytest.approx(variance**0.5 / float(exact.norm()), rel=1e-4)
    assert got.bias == pytest.approx(float((chances * (values - truth)).mean(0).sum()), abs=1e-5)
    assert got["std"] == pytest.approx(float((chances * values.var(0, correction=0)).sum().sqrt()), abs=1e-4)
    joint = np.cov(values.flatten(), truth.repeat(2), aweights=chances.repeat(2), ddof=0)
    joint = joint / np.sqrt(np.outer(joint.diagonal(), joint.diagonal()))
    assert got.correlation == pytest.approx(float(joint[0, 1]), abs=1e-4)


def test_cost_in_passes():
    assert errors(HALTON, masks=1).passes.to_dict() == {
        "replay": 3, "random_mask": 1, "one_step": 1, "coupled": 2, "critical": 2,
    }  # fmt: skip
    assert set(errors(CONFIDENT).passes) == {2}


def test_masks_come_from_the_seed():
    first, again, other = (errors(HALTON, masks=3, seed=seed) for seed in (0, 0, 9))
    assert first.equals(again)
    changed = (first.bias != other.bias).to_dict()
    assert {name for name, differs in changed.items() if differs} == set(bakeoff.DRAWN)


def test_one_step_is_exact_for_one_step():
    table = errors(SamplerConfig(steps=1, order="halton"), masks=1)
    assert abs(table.bias["one_step"]) < 1e-5 and table.gradient_bias["one_step"] < 1e-3


@pytest.fixture(scope="module")
def kl_table():
    reference = tiny()
    return bakeoff.kl_errors(bakeoff.nudged(reference, 0.2), reference, PROMPT, HALTON).set_index("estimator")


def test_expected_gradient_of_each_kl_estimator(kl_table):
    assert kl_table.bias_reverse["cross_entropy"] > 0.05, "far enough to tell the two apart"
    for name in ("exact", "k1", "k2"):
        assert kl_table.bias_reverse[name] < 1e-4 and kl_table.cosine_reverse[name] > 1 - 1e-6
    for name in ("cross_entropy", "k3"):
        assert kl_table.bias_forward[name] < 1e-4 and kl_table.cosine_forward[name] > 1 - 1e-6
    naive = kl_table.loc["k1 as a loss"]
    assert naive.gradient_norm < 1e-4 and naive.gradient_std > 0.1 and np.isnan(naive.cosine_reverse)
    assert (kl_table["std"][["cross_entropy", "exact"]] < 1e-6).all()
    assert (kl_table.gradient_std[["cross_entropy", "exact"]] < 1e-6).all()


def test_kl_values_equal_a_loop_over_trajectories(kl_table):
    """Each trajectory visits its states and draws its codes; nothing is looked up."""
    reference = tiny()
    policy = bakeoff.nudged(reference, 0.2)
    names = ("cross_entropy", "exact", "k1", "k2", "k3")
    totals, squares, inside = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    with torch.no_grad():
        outcomes = enumerate_trajectories(policy, PROMPT, HALTON)
        cond = policy.encode([PROMPT])
        for row, chance in enumerate(outcomes.log_prob.exp() / 3):  # a third for each of three tokens
            one = outcomes.trajectory.select(torch.tensor([row]))
            for step in range(3):
                position = int(one.reveal_step[0].eq(step).nonzero())
                rows, info = torch.tensor([position]), StepInfo(step, 3)
                pair = [g.logits(one.state(step), cond, info, rows).log_softmax(-1) for g in (policy, reference)]
                for name in names:
                    every = [kl_penalty(*pair, torch.tensor([code]), name) for code in range(2)]
                    mean = (pair[0].exp()[0] * torch.cat(every)).sum()
                    value = every[int(one.tokens[0, position])]
                    totals[name] += float(chance * value)
                    squares[name] += float(chance * (value - mean).square())
                    inside[name] += float(
                        chance * (reverse_kl(*pair) if name != "cross_entropy" else forward_kl(*pair))
                    )
    for name in names:
        assert kl_table.value[name] == pytest.approx(totals[name], abs=1e-5)
        assert kl_table["std"][name] == pytest.approx(squares[name] ** 0.5, abs=1e-5)
        assert (abs(totals[name] - inside[name]) < 1e-5) == (name != "k2")
        bias = totals[name] - inside["exact"]
        assert kl_table.bias[name] == pytest.approx(bias, abs=1e-5)


def test_k3_stays_finite_where_the_textbook_form_does_not():
    table = bakeoff.k3_overflow([1.0, 10.0, 100.0, 1000.0])
    ours = table[["ours", "ours_gradient"]].to_numpy()
    assert np.isfinite(ours).all() and not np.isfinite(table.textbook[2:]).any()
    assert np.allclose(ours[:2], table[["textbook", "textbook_gradient"]][:2], rtol=1e-5)


def test_equal_neighbors():
    tokens = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1]])
    assert bakeoff.equal_neighbors(tokens, (2, 2)).tolist() == [1.0, 0.0, 0.5]
    assert bakeoff.equal_neighbors(tokens[:, :3], (1, 3)).tolist() == [1.0, 0.5, 0.5]


def test_a_nudge_moves_a_copy():
    generator, before = tiny(), flat(tiny().policy.parameters()).detach()
    moved = flat(bakeoff.nudged(generator, 0.1, seed=1).policy.parameters()).detach() - before
    assert torch.equal(flat(generator.policy.parameters()).detach(), before)
    assert float(moved.std()) == pytest.approx(0.1, rel=0.1)
    assert not torch.equal(moved, flat(bakeoff.nudged(generator, 0.1, seed=2).policy.parameters()).detach() - before)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"guidance_scale": 2.0}, "guidance_scale=2.0: estimators are compared with 1.0"),
        ({"temperature": 0.5}, "temperature=0.5: estimators are compared with 1.0"),
        ({"schedule": "paced"}, "schedule='paced': expected a fixed number of steps"),
    ],
)
def test_what_cannot_be_compared_is_refused(settings, message):
    sampler = SamplerConfig(**{"steps": 2, **settings})
    with pytest.raises(ValueError, match=message):
        bakeoff.likelihood_errors(tiny(), PROMPT, sampler, reward)
    with pytest.raises(ValueError, match=message):
        bakeoff.kl_errors(tiny(), tiny(), PROMPT, sampler)


def test_kl_on_a_confidence_order_is_refused():
    with pytest.raises(ValueError, match="order='confidence': .* take order='halton'"):
        bakeoff.kl_errors(tiny(), tiny(), PROMPT, CONFIDENT)


def test_figures_name_every_estimator(kl_table):
    table = errors(HALTON, masks=2).reset_index()
    left, right = estimator_plots.trade_offs(table).axes
    expected_names = ["replay (3)", "random_mask (1)", "one_step (1)", "coupled (2)", "critical (2)"]
    assert [tick.get_text() for tick in left.get_yticklabels()] == expected_names
    assert {text.get_text() for text in right.texts} == set(expected_names)
    figure = estimator_plots.bars(kl_table.reset_index(), {"cosine_reverse": "reverse", "cosine_forward": "forward"})
    (axes,) = figure.axes
    assert len(axes.patches) == 12 and [text.get_text() for text in axes.texts].count("none") == 2
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(kl_table.index)
