"""The published sampler, token for token, on recorded runs with random logits."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from torch import Tensor

from speedrl_lab import parity
from speedrl_lab.generator import Cond, GeneratorSpec, StepInfo

N, V, MASK = 64, 32, 39
RUN = np.load(GOLDEN / "scheduler_tiny.npz", allow_pickle=False)
FULL = [
    f"{schedule}_T{steps}_{noise}"
    for schedule in ("cosine", "linear")
    for steps in (4, 8, 12)
    for noise in ("seed0", "seed1234", "injected")
]
PARTIAL = ["cosine_T8_partial_injected", "linear_T8_partial_injected"]


def probe() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.empty(64).exponential_(1, generator=rng), torch.empty(16).uniform_(0, 1, generator=rng)


def same_draws() -> bool:
    """Whether this build draws exponentials as the recording one did."""
    exponentials, uniforms = probe()
    return np.array_equal(exponentials.numpy(), RUN["probe_exponential"]) and np.array_equal(
        uniforms.numpy(), RUN["probe_uniform_after"]
    )


def recorded_logits(tokens: Tensor, step: int) -> Tensor:
    """The recording's logits (B, N, V): a code shift by the step and the known tokens."""
    base = torch.from_numpy(RUN["base_logits"]).float()
    shifts = (step + torch.where(tokens == MASK, 0, tokens).sum(1)) % V
    rolled = [torch.roll(row, int(shift), dims=0) for row, shift in zip(base, shifts, strict=True)]
    return torch.stack(rolled).flatten(2).transpose(1, 2).contiguous()


class SeededNoise:
    """One torch generator; a last step draws no uniforms."""

    def __init__(self, seed: int):
        self.rng = torch.Generator().manual_seed(seed)

    def draw(self, last: bool) -> tuple[Tensor, Tensor]:
        exponentials = torch.empty(2 * N, V).exponential_(1, generator=self.rng).view(2, N, V)
        uniforms = torch.zeros(2, N)
        return exponentials, uniforms if last else uniforms.uniform_(0, 1, generator=self.rng)


class InjectedNoise:
    """A frozen NumPy stream, equal on every machine."""

    def __init__(self):
        self.rng = np.random.RandomState(9)

    def draw(self, last: bool) -> tuple[Tensor, Tensor]:
        exponentials = -np.log1p(-self.rng.random_sample((2, N, V)))
        uniforms = self.rng.random_sample((2, N))
        return torch.from_numpy(exponentials).float(), torch.from_numpy(uniforms).float()


def test_injected_noise_is_the_recorded_stream():
    exponentials, uniforms = InjectedNoise().draw(last=False)
    assert np.array_equal(exponentials[0, :2].numpy(), RUN["injected_exp_head"].reshape(2, -1)[:, :V])
    assert np.array_equal(uniforms.flatten()[:8].numpy(), RUN["injected_uniform_head"])


@pytest.mark.parametrize("name", FULL + PARTIAL)
def test_unmask_repeats_the_recorded_run(name):
    schedule, steps, kind = name.split("_")[0], int(name.split("_")[1][1:]), name.split("_")[-1]
    if kind != "injected" and not same_draws():
        pytest.skip("this torch build draws exponentials in another way")
    noise = InjectedNoise() if kind == "injected" else SeededNoise(int(kind[4:]))
    tokens = torch.full((2, N), MASK)
    if "partial" in name:
        tokens = torch.from_numpy(RUN["partial_start"]).long().flatten(1)
    for step in range(steps):
        masked = tokens == MASK
        exponentials, uniforms = noise.draw(last=step == steps - 1)
        tokens, drawn = parity.unmask(
            tokens, recorded_logits(tokens, step), exponentials, uniforms, MASK, step, steps, schedule
        )
        revealed = (masked & (tokens != MASK)).sum(1)
        assert tokens.tolist() == RUN[f"tokens_{name}"][step].reshape(2, N).tolist(), f"step {step}"
        assert drawn.tolist() == RUN[f"pred_{name}"][step].reshape(2, N).tolist(), f"step {step}"
        assert revealed.tolist() == RUN[f"revealed_{name}"][step].tolist(), f"step {step}"


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [4, 8, 12])
def test_masks_left_round_as_published(schedule, steps):
    left = [parity.masks_left(N, step, steps, schedule) for step in range(steps)]
    rule = [max(1, min(N, value)) for value in left[:-1]]
    assert rule == RUN[f"masks_left_{schedule}_T{steps}"][:-1, 0].tolist()


def test_masks_left_keep_the_float32_rounding():
    # Exact mathematics would leave 32 of 64 and 512 of 1024 masks here.
    assert parity.masks_left(64, 7, 12) == 31
    assert parity.masks_left(1024, 7, 12) == 511


def test_unknown_schedules_are_refused():
    with pytest.raises(ValueError, match="parity knows cosine and linear"):
        parity.masks_left(64, 0, 4, "halton")


class RecordedGenerator:
    """The recording's logits behind the generator contract."""

    spec = GeneratorSpec(
        name="recorded", grid=(8, 8), image_size=(32, 32), codebook_size=V, mask_id=MASK,
        conditioning="class", time_input="none",
    )  # fmt: skip

    def null(self, count: int) -> Cond:
        return Cond({"label": torch.zeros(count, 1)})

    def logits(self, tokens: Tensor, cond: Cond, step: StepInfo, rows: Tensor | None = None) -> Tensor:
        # Rows come twice when guided: conditional and unconditional halves get equal logits.
        return torch.cat([recorded_logits(part, step.index) for part in tokens.split(2)])


@pytest.mark.skipif(not same_draws(), reason="this torch build draws exponentials in another way")
@pytest.mark.parametrize("name", [name for name in FULL if "seed" in name])
def test_sample_parity_repeats_the_recorded_run(name):
    schedule, steps, kind = name.split("_")
    rng = torch.Generator().manual_seed(int(kind[4:]))
    before = torch.get_rng_state()
    cond = Cond({"label": torch.ones(2, 1)})
    tokens = parity.sample_parity(RecordedGenerator(), cond, int(steps[1:]), rng, guidance_scale=1.0, schedule=schedule)
    assert tokens.tolist() == RUN[f"tokens_{name}"][-1].reshape(2, N).tolist()
    assert torch.equal(before, torch.get_rng_state())


def test_sample_parity_hands_a_guided_pair_to_the_generator():
    seen = []

    class Watched(RecordedGenerator):
        def logits(self, tokens, cond, step, rows=None):
            seen.append((len(tokens), cond.tensors["label"].flatten().tolist()))
            return super().logits(tokens, cond, step, rows)

    rng = torch.Generator().manual_seed(0)
    parity.sample_parity(Watched(), Cond({"label": torch.ones(2, 1)}), 4, rng, guidance_scale=5.0)
    assert seen == [(4, [1.0, 1.0, 0.0, 0.0])] * 4


def test_recorded_temperatures_fall_to_zero():
    for steps in (4, 8, 12):
        expected = torch.linspace(2.0, 0.0, steps)
        assert np.array_equal(RUN[f"temperatures_T{steps}"], expected.numpy())
