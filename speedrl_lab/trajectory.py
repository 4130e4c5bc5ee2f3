"""The compact record of one unmasking: final tokens and the step at which each was fixed."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from speedrl_lab.config import SamplerConfig


@dataclass(frozen=True)
class Trajectory:
    """What a sampler did to B samples of N tokens; enough to rebuild every state.

    A fixed token never changes, so the state before step i is `tokens` where `reveal_step < i` and the
    mask elsewhere; the first state may be `start` instead. Where steps revise, `drafts` holds the states.
    """

    tokens: Tensor
    """Final codes, int64 (B, N)."""
    reveal_step: Tensor
    """Step at which each position was fixed, or first drawn where steps revise, int16 (B, N), from 0."""
    steps: Tensor
    """Rounds of unmasking of each sample, int64 (B,)."""
    forwards: Tensor
    """Forward passes of each sample, int64 (B,); a guided step costs two."""
    log_prob: Tensor
    """Log-probability of each final token when it was drawn, float32 (B, N)."""
    mask_id: int
    """Input id of the mask."""
    sampler: SamplerConfig | None = None
    """The settings it was drawn with; likelihoods refuse any others."""
    start: Tensor | None = None
    """What the first step saw, int64 (B, N), where it was not masks alone (`start_noise`)."""
    order: Tensor | None = None
    """Positions in the order of revealing, int64 (B, N): fixed beforehand, or made by the confidence draw."""
    drafts: Tensor | None = None
    """Where steps revise: the tokens after each step, int64 (B, T, N) with masks; a finished sample's stay."""
    draft_log_prob: Tensor | None = None
    """Where steps revise: log-probability of each token drawn at each step, float32 (B, T, N), 0 where none was."""
    proposals: Tensor | None = None
    """Confidence order: token proposed for each masked position at each step, int64 (B, T, N), else -1."""
    proposal_log_prob: Tensor | None = None
    """Confidence order: log-probability of each proposal, float32 (B, T, N), 0 where none was made."""
    choice_log_prob: Tensor | None = None
    """Confidence order: log-probability of each step's ordered choice among the proposals, float32 (B, T)."""
    pace: Tensor | None = None
    """Pace action taken at each step, int64 (B, T), -1 where none was taken."""
    pace_features: Tensor | None = None
    """What the pace head saw at each step, float32 (B, T, F)."""
    pace_log_prob: Tensor | None = None
    """Log-probability of each pace action, float32 (B, T), 0 where none was taken."""

    def __len__(self) -> int:
        return len(self.tokens)

    def state(self, step: int) -> Tensor:
        """The tokens that step `step` sees, int64 (B, N)."""
        if step == 0 and self.start is not None:
            return self.start
        if self.drafts is not None and step > 0:
            return self.drafts[:, step - 1]
        return torch.where(self.reveal_step < step, self.tokens, self.mask_id)

    def revealed(self, step: int) -> Tensor:
        """Which positions step `step` fixed, bool (B, N)."""
        return self.reveal_step == step

    def drawn(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """What step `step` drew: where, bool (B, N), codes (B, N) and their log-probabilities when drawn (B, N)."""
        if self.drafts is None:
            return self.revealed(step), self.tokens, self.log_prob
        after = self.drafts[:, step]
        return (after != self.mask_id) & (self.steps > step)[:, None], after, self.draft_log_prob[:, step]

    def select(self, rows: Tensor) -> "Trajectory":
        """The samples at `rows`, an index or bool tensor."""
        chosen = {
            f.name: getattr(self, f.name)[rows] for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **chosen)
