"""Guards of a training run: collapse, loss of diversity, reward hacking, rewards that cannot act.

A guard looks at records alone and says in words what is wrong. Its memory is plain numbers, so that it
goes on with a run.
"""

from collections.abc import Mapping
from typing import Any

from speedrl_lab.config import TrainConfig

SMOOTHING = 0.9
"""Of the curves that are watched."""
HACKING_DROP = 0.5
"""A held-out reward this far below its best, in within-group deviations, while progress is at its best, is an alarm."""
LEAST_STD = 1e-4
"""Of a reward inside groups; below it, it does not say anything yet."""
STATE = ("smoothed", "best_progress", "scale", "first_diversity", "held_out", "weights", "collapsed")


class Guard:
    """Watches the records of a run."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.smoothed: float | None = None
        self.best_progress: float | None = None
        self.scale: dict[str, tuple[float, float]] = {}
        self.first_diversity: float | None = None
        self.held_out: dict[str, tuple[float, float]] = {}
        self.weights: dict[str, float] | None = None
        self.collapsed = False

    @property
    def at_best(self) -> bool:
        """Whether the last record was the best so far, smoothed."""
        return self.smoothed == self.best_progress

    def watch(self, record: Mapping[str, Any]) -> list[str]:
        """Take in a record; returns warnings, none if all is well."""
        for name, mean in record["rewards"].items():
            if record["rewards_std"][name] > LEAST_STD:  # from the first iteration in which it says something
                self.scale.setdefault(name, (mean, record["rewards_std"][name]))
        return [
            *self._collapse(record),
            *self._hacking(record),
            *self._diversity(record),
            *(
                f"reward {name!r} does not vary inside any group, so its weight does nothing"
                for name in record["silent_rewards"]
            ),
        ]

    def progress(self, record: Mapping[str, Any]) -> float:
        """Weighted rise of the quality rewards, each in its within-group deviations at its start."""
        weights = {name: weight for name, weight in self._weights(record).items() if name in record["rewards"]}
        rises = [weight * self._rise(record, name) for name, weight in weights.items()]
        return sum(rises) / max(sum(map(abs, weights.values())), 1e-9)

    def _weights(self, record: Mapping[str, Any]) -> dict[str, float]:
        return {name: record["weights"][name] for name in self.config.quality_weights}

    def _rise(self, record: Mapping[str, Any], name: str) -> float:
        if name not in self.scale:
            return 0.0
        start, std = self.scale[name]
        return (record["rewards"][name] - start) / std

    def _collapse(self, record: Mapping[str, Any]) -> list[str]:
        progress = self.progress(record)
        if self.weights not in (None, self._weights(record)):
            self.smoothed = self.best_progress = None  # other weights, another measure
        self.weights = self._weights(record)
        before = progress if self.smoothed is None else self.smoothed
        self.smoothed = SMOOTHING * before + (1 - SMOOTHING) * progress
        if self.best_progress is None or self.smoothed >= self.best_progress:
            self.best_progress = self.smoothed
        if self.smoothed >= self.best_progress - self.config.collapse_drop:
            return []
        self.collapsed = True
        return [
            f"collapse: smoothed progress {self.smoothed:.2f} fell more than {self.config.collapse_drop:g} "
            f"below its best {self.best_progress:.2f}; best weights restored"
        ]

    def _hacking(self, record: Mapping[str, Any]) -> list[str]:
        """A reward that is only watched falls while those that are trained on have never been better."""
        warnings = []
        for name in record["rewards"]:
            if name in self.config.quality_weights or name == "speed":
                continue
            rise = self._rise(record, name)
            smoothed, best = self.held_out.get(name, (rise, rise))
            smoothed = SMOOTHING * smoothed + (1 - SMOOTHING) * rise
            best = max(best, smoothed)
            self.held_out[name] = (smoothed, best)
            if self.at_best and smoothed < best - HACKING_DROP:
                warnings.append(
                    f"reward hacking? {name!r}, which is not trained on, fell {best - smoothed:.2f} deviations below "
                    "its best while the trained rewards rise; look at the pictures, raise kl_weight or change rewards"
                )
        return warnings

    def _diversity(self, record: Mapping[str, Any]) -> list[str]:
        if self.first_diversity is None:
            self.first_diversity = record["diversity"]
        if record["diversity"] >= self.config.diversity_floor * self.first_diversity:
            return []
        return [
            f"diversity {record['diversity']:.3f} is below {self.config.diversity_floor:.0%} of its "
            "start; raise kl_weight or give 'novelty' a weight"
        ]

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {name: getattr(self, name) for name in STATE}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        for name in STATE:
            setattr(self, name, state[name])
