"""Every knob of the project, once: frozen dataclasses, presets, and strict flat access.

Field names are unique over all classes, so one flat papermill parameter maps to one field. Presets
are Python, in `presets`. Standard library only; no other module defines a setting.
"""

import difflib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

Order = Literal["confidence", "halton", "random"]
Schedule = Literal["cosine", "linear", "arccos", "power", "paced", "adaptive", "random_budget", "threshold"]
PolicyDtype = Literal["float32", "bfloat16"]
HEADED = ("paced", "adaptive")
"""Schedules that a pace head decides."""
VARYING = (*HEADED, "random_budget", "threshold")
"""Schedules under which samples of one group take different numbers of steps."""


def nearest(name: str, known: list[str]) -> str:
    """The known name that looks most like `name`."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


class _Checked:
    """Checks that hold for every config class: Literal fields hold a listed value."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal and value not in get_args(kind):
                options = [str(option) for option in get_args(kind)]
                raise ValueError(
                    f"{name}={value!r} is not known; nearest: {nearest(str(value), options)!r} "
                    f"(one of {', '.join(options)})"
                )

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(_Checked):
    """How tokens are revealed."""

    steps: int = 8
    """Rounds of unmasking; for the paced and adaptive schedules, the most there can be."""
    order: Order = "halton"
    """Which positions come first; Halton and random orders do not depend on the model."""
    schedule: Schedule = "cosine"
    """How many positions each step reveals. `paced`: the policy's pace head chooses. `adaptive`: the head chooses
    temperature and guidance of the step as well. `random_budget`: a power schedule of 1 to `steps` steps, drawn
    for every sample. `threshold`: the power schedule, until the policy is confident of all that is left."""
    power: float = 3.0
    """Exponent of the power schedule: after step i of T, a share ((i+1)/T)**power is known."""
    stop_confidence: float = 0.9
    """Threshold schedule: everything left is revealed once its mean largest probability reaches this."""
    guidance_scale: float = 1.0
    """s in z = u + s(c - u); 1 is off and costs one pass a step instead of two."""
    temperature: float = 1.0
    """Divides the logits of the tokens."""
    first_temperature: float = 1.0
    """Divides those of the first step once more. Its few tokens decide where samples of a prompt part: above 1 they
    differ more, while later steps, kept cool, make each of them right."""
    choice_temperature: float = 1.0
    """Gumbel noise on the confidences, falling linearly to 0; confidence order only."""
    greedy_pace: bool = False
    """Take the most probable pace instead of drawing one (evaluation)."""
    revise: bool = False
    """Every step draws anew what earlier steps drew, for a network that has learned to (`method="revise"`): mistakes
    of tokens drawn side by side are mended. The last step decides every token."""
    start_noise: float = 0.0
    """Share of positions that show a random code instead of a mask in the first step, where they are drawn all
    the same: what a generator of one or few steps takes its diversity from (Di[M]O, arXiv 2503.15457). All tokens
    see it, so that those drawn side by side agree; a few codes are enough."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(isinstance(self.steps, int) and self.steps >= 1, "steps", "an integer of at least 1")
        self._require(self.power > 0, "power", "a positive number")
        self._require(self.guidance_scale >= 0, "guidance_scale", "a number of at least 0 (1 is off)")
        for name in ("temperature", "first_temperature"):
            self._require(getattr(self, name) > 0, name, "a positive number")
        self._require(self.choice_temperature >= 0, "choice_temperature", "a number of at least 0")
        self._require(0 < self.stop_confidence <= 1, "stop_confidence", "a number above 0, at most 1")
        self._require(0 <= self.start_noise <= 1, "start_noise", "a share from 0 to 1")
        for name in ("temperature", "first_temperature", "guidance_scale"):
            if self.schedule == "adaptive" and getattr(self, name) != 1.0:
                raise ValueError(f"{name}={getattr(self, name)!r}: schedule='adaptive' chooses it; leave it at 1.0")
        if self.schedule in VARYING and self.order == "confidence":
            raise ValueError(f"schedule={self.schedule!r} needs a model-independent order: 'halton' or 'random'")
        if self.revise and self.order == "confidence":
            raise ValueError("revise=True needs a model-independent order: 'halton' or 'random'")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Checked):
    """The Speed-RL loop (GRPO)."""

    sampler: SamplerConfig = SamplerConfig(steps=4, order="halton", schedule="power")
    """Rollouts are drawn with exactly this sampler, and scored with exactly this distribution."""
    trained: Literal["policy", "schedule"] = "policy"
    """`policy`: network and pace head. `schedule`: the pace head alone, on a frozen network (AdaNAT, arXiv
    2409.00342); nothing then holds to a reference or scores tokens, so that an update costs no passes."""
    iterations: int = 100
    """Rollout-and-update rounds."""
    num_groups: int = 12
    """Prompts per iteration."""
    group_size: int = 8
    """Samples per prompt; the advantage is computed inside the group."""
    learning_rate: float = 2e-4
    """Of the policy (Adam), after the warm-up."""
    pace_learning_rate: float = 3e-3
    """Of the pace head (Adam)."""
    warmup_iterations: int = 10
    """Learning rates rise linearly over these; they never exceed a line that falls to 0 at the end."""
    inner_epochs: int = 1
    """Passes over each rollout; above 1 the PPO clip acts."""
    clip_range: float = 0.2
    """Epsilon of the PPO clip on the per-token probability ratio."""
    micro_batch_size: int = 32
    """Rows scored at once in the update; changes memory, not the gradient. 0: of 64, 32, ... the most that fit into
    the memory that is free when the run starts, as the planner counts it."""
    gradient_checkpointing: bool = False
    """Recompute each block of the network in the backward pass: less memory, about a third more time."""
    policy_dtype: PolicyDtype = "float32"
    """Of the weights that training leaves as they are; adapters, optimizer and all sampling mathematics stay
    float32. `bfloat16` halves their memory, decodes pictures in it too, and is faster on a GPU; it needs `lora_rank` or
    trained='schedule'."""
    kl_weight: float = 0.02
    """Beta of the penalty that holds the policy near the reference."""
    kl_estimator: Literal["cross_entropy", "exact", "k1", "k2", "k3"] = "cross_entropy"
    """Full vocabulary at visited states: forward KL(reference, policy) or `exact` reverse KL(policy, reference);
    `k1`, `k2`, `k3` estimate the reverse one from the tokens drawn."""
    practice_steps: tuple[int, ...] = ()
    """Numbers of steps that every second rollout practises in turn, by the power schedule, so that the policy
    serves fixed budgets as well as its own pace; without a weight of speed, a single one without first_temperature."""
    estimator: Literal["replay", "random_mask", "one_step", "coupled", "critical"] = "replay"
    """How the log-probability of a trajectory is estimated; `replay` is exact, the others are cheaper and biased."""
    order_factor: Literal["exact", "token_only"] = "exact"
    """Confidence order: Plackett-Luce over all proposals, or the kept tokens alone (biased; to show it)."""
    lora_rank: int = 0
    """Rank of the adapters that are trained instead of the weights (peft); 0 trains all weights."""
    ema_decay: float = 0.0
    """Of the average of the policy's weights that is kept as the result; 0 keeps the last weights."""
    advantage_std: Literal["global", "group", "none"] = "global"
    """What the summed advantage is divided by."""
    quality_weights: Mapping[str, float] = field(default_factory=lambda: {"clip": 1.0})
    """Weight of each quality reward after its z-score inside the group."""
    speed_weight: float = 0.0
    """Weight of the speed reward after its z-score; acts only if steps vary. The exponent of the
    multiplicative form, the first multiplier of the Lagrangian one."""
    speed_form: Literal["additive", "multiplicative", "hinge", "lagrangian"] = "additive"
    """How speed joins quality: added; as a factor; added where quality reaches `quality_floor`; added with a
    multiplier that moves until the mean cost is `target_steps`."""
    quality_floor: Mapping[str, float] = field(default_factory=dict)
    """Hinge form: least raw value of each named reward below which speed earns nothing."""
    target_steps: float = 3.0
    """Lagrangian form: mean number of forward passes to hold; without guidance, that is steps."""
    multiplier_rate: float = 0.05
    """Lagrangian form: change of the multiplier an iteration, times the relative excess of passes."""
    weight_schedules: Mapping[str, Any] = field(default_factory=dict)
    """Weights that change: reward name, `speed` or `kl` -> [[iteration, weight], ...], linear in between."""
    filter_quantile: float = 0.0
    """Samples below this quantile of their group's quality are low-quality; 0 turns the filter off."""
    low_quality: Literal["off", "clip", "drop"] = "off"
    """Low-quality samples: advantage clipped at 0, or dropped."""
    collapse_drop: float = 1.0
    """Stop and restore the best weights when the smoothed progress falls this far below its best; progress
    is the weighted rise of the quality rewards in within-group standard deviations of iteration 1."""
    diversity_floor: float = 0.5
    """Warn when within-group diversity falls below this share of its start."""
    save_every: int = 20
    """Iterations between checkpoints."""
    seed: int = 0
    """Of rollouts and prompt draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.iterations >= 1, "iterations", "at least 1")
        self._require(self.num_groups >= 1, "num_groups", "at least 1")
        self._require(
            self.group_size >= 2,
            "group_size",
            "at least 2: the advantage compares the samples of one prompt with each other",
        )
        self._require(self.inner_epochs >= 1, "inner_epochs", "at least 1")
        self._require(0 < self.clip_range < 1, "clip_range", "a number between 0 and 1")
        self._require(self.micro_batch_size >= 0, "micro_batch_size", "at least 1, or 0 for what fits")
        self._require(self.learning_rate > 0, "learning_rate", "a positive number")
        self._require(self.kl_weight >= 0, "kl_weight", "a number of at least 0")
        self._require(
            not self.practice_steps or min(self.practice_steps) >= 1, "practice_steps", "step counts from 1"
        )
        self._require(0 <= self.filter_quantile < 1, "filter_quantile", "a number in [0, 1)")
        self._require(bool(self.quality_weights), "quality_weights", "at least one reward name")
        self._require(self.lora_rank >= 0, "lora_rank", "at least 0 (0 trains all weights)")
        self._require(0 <= self.ema_decay < 1, "ema_decay", "a number in [0, 1)")
        self._require(self.target_steps >= 1, "target_steps", "at least 1")
        self._require(self.multiplier_rate > 0, "multiplier_rate", "a positive number")
        self._require(self.save_every >= 1, "save_every", "at least 1")
        self._require(self.warmup_iterations >= 0, "warmup_iterations", "at least 0")
        self._require(self.pace_learning_rate > 0, "pace_learning_rate", "a positive number")
        for name in ("quality_weights", "quality_floor"):
            self._require(all(map(_is_number, getattr(self, name).values())), name, "a finite number for each name")
        self._check_combinations()
        sampler = self.sampler
        exact = self.estimator == "replay" and self.order_factor == "exact" and sampler.steps > 1
        if sampler.order == "confidence" and exact and sampler.choice_temperature == 0:
            raise ValueError(
                "choice_temperature=0.0 makes the confidence order deterministic, so that its probability has no "
                "gradient; train with choice_temperature=1.0 or order='halton'"
            )
        self._check_schedules()
        if self.sampler.greedy_pace:
            raise ValueError("greedy_pace=True leaves the pace nothing to learn; train with greedy_pace=False")

    def _check_combinations(self) -> None:
        """Refuse settings of which one would silently do nothing."""
        scheduled, frozen = "speed" in self.weight_schedules, self.trained == "schedule"
        quiet = self.speed_weight == 0 and not scheduled
        clashes = {
            "speed_form='hinge' needs quality_floor, for instance quality_floor={'clip': 0.8}":
                self.speed_form == "hinge" and not self.quality_floor,
            "quality_floor acts with speed_form='hinge' only; set that, or leave quality_floor out":
                self.speed_form != "hinge" and bool(self.quality_floor),
            f"speed_form={self.speed_form!r} needs a speed_weight above 0":
                self.speed_form in ("hinge", "multiplicative") and quiet,
            "speed_form='lagrangian' moves the weight of speed itself; leave 'speed' out of weight_schedules":
                self.speed_form == "lagrangian" and scheduled,
            "filter_quantile and low_quality act together: give both, or neither":
                (self.low_quality == "off") != (self.filter_quantile == 0),
            "order_factor='token_only' changes nothing without order='confidence' and estimator='replay'":
                self.order_factor == "token_only"
                and (self.sampler.order != "confidence" or self.estimator != "replay"),
            "practice_steps act beside a schedule under which steps vary, such as schedule='paced', and train the "
            "policy: give trained='policy'":
                bool(self.practice_steps)
                and (self.sampler.schedule not in VARYING or self.trained == "schedule"),
            "quality_weights holds 'speed', which has a weight of its own: speed_weight":
                "speed" in self.quality_weights,
            f"schedule={self.sampler.schedule!r} leaves trained='schedule' nothing to learn; use 'paced' or 'adaptive'":
                frozen and self.sampler.schedule not in HEADED,
            "steps=1 leaves the pace nothing to choose; use steps of at least 2, or schedule='adaptive'":
                frozen and self.sampler.schedule == "paced" and self.sampler.steps == 1,
            "trained='schedule' leaves the policy as it is; leave lora_rank, ema_decay and estimator at their defaults":
                frozen and (self.lora_rank > 0 or self.ema_decay > 0 or self.estimator != "replay"),
            f"estimator={self.estimator!r} knows nothing of drafts that were revised; revise=True needs 'replay'":
                self.sampler.revise and self.estimator != "replay",
            f"estimator={self.estimator!r} makes states without an action; schedule='adaptive' needs 'replay'":
                self.sampler.schedule == "adaptive" and self.estimator not in ("replay", "critical"),
            "policy_dtype='bfloat16' is for weights that are not trained, whose small steps it would round away; set "
            "lora_rank=16, or leave policy_dtype='float32'":
                self.policy_dtype == "bfloat16" and self.lora_rank == 0 and not frozen,
            "gradient_checkpointing saves memory of the network's backward pass, and trained='schedule' has none; "
            "leave it out":
                self.gradient_checkpointing and frozen,
        }  # fmt: skip
        for message, clash in clashes.items():
            if clash:
                raise ValueError(message)

    def _check_schedules(self) -> None:
        known = [*self.quality_weights, "speed", "kl"]
        for name, points in self.weight_schedules.items():
            if name not in known:
                raise ValueError(
                    f"weight_schedules names {name!r}; nearest: {nearest(name, known)!r} (one of {', '.join(known)})"
                )
            pairs = isinstance(points, list | tuple) and all(
                isinstance(point, list | tuple) and len(point) == 2 and all(map(_is_number, point)) for point in points
            )
            times = [point[0] for point in points] if pairs else []
            if not times or times != sorted(set(times)):
                raise ValueError(
                    f"weight_schedules[{name!r}]={points!r}: expected [[iteration, weight], ...], iterations rising"
                )


@dataclass(frozen=True, kw_only=True)
class DistillConfig(_Checked):
    """The distillation rivals of Speed-RL."""

    method: Literal["sdtt", "dimo", "revise"] = "sdtt"
    """`sdtt`: one student step matches two guided teacher steps, in rounds (arXiv 2410.21035). `dimo`: samples of
    one to a few steps match the teacher token by token, with an auxiliary model of them (arXiv 2503.15457). `revise`:
    learns to draw anew what it already drew, from the teacher's samples (ours)."""
    distill_iterations: int = 600
    """Optimizer steps of the student."""
    distill_batch_size: int = 96
    """Samples an iteration."""
    distill_learning_rate: float = 1e-4
    """Of the student (Adam); warms up over 20 iterations and falls linearly to 0."""
    teacher_guidance: float = 2.0
    """Guidance scale of the teacher, folded into the student."""
    teacher_temperature: float = 1.0
    """revise: token temperature of the teacher, folded into the student."""
    reverse_share: float = 0.0
    """Share of KL(student, teacher) in the loss, the rest is KL(teacher, student); `dimo` may go below 0."""
    rounds: int = 3
    """sdtt: rounds; after each the student is the teacher of the next, which takes half the steps."""
    teacher_steps: int = 16
    """sdtt, revise: steps of the first teacher over a whole picture."""
    pool_size: int = 2048
    """sdtt, revise: teacher samples that states are made from."""
    student_steps: tuple[int, ...] = (1, 2, 4)
    """dimo: steps of the student's samples, in turn."""
    auxiliary_learning_rate: float = 5e-4
    """dimo: of the model of the student's samples (Adam); slower than the student's, the two chase each other."""
    distill_ema: float = 0.95
    """Of the average of the student's weights that is the result; 0 keeps the last weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("distill_iterations", "distill_batch_size", "rounds", "pool_size"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("distill_learning_rate", "auxiliary_learning_rate"):
            self._require(getattr(self, name) > 0, name, "a positive number")
        self._require(0 <= self.distill_ema < 1, "distill_ema", "a number in [0, 1)")
        self._require(self.teacher_guidance >= 0, "teacher_guidance", "a number of at least 0 (1 is off)")
        self._require(self.teacher_temperature > 0, "teacher_temperature", "a positive number")
        self._require(-1 <= self.reverse_share <= 1, "reverse_share", "a number from -1 to 1")
        self._require(
            self.teacher_steps % 2**self.rounds == 0,
            "teacher_steps",
            f"a multiple of 2**rounds = {2**self.rounds}: every round halves the steps",
        )
        self._require(
            len(self.student_steps) > 0 and min(self.student_steps) >= 1, "student_steps", "step counts from 1"
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig(_Checked):
    """The frontier."""

    budgets: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Sampling steps compared."""
    num_prompts: int = 256
    """Prompts of the split, in file order."""
    num_seeds: int = 3
    """Sampling seeds; each is one row of the table for a model and budget."""
    split: Literal["validation", "test", "composition"] = "test"
    """Which prompts; none of them was trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(len(self.budgets) > 0 and min(self.budgets) >= 1, "budgets", "step counts from 1")
        self._require(self.num_prompts >= 2, "num_prompts", "at least 2")
        self._require(self.num_seeds >= 1, "num_seeds", "at least 1")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(_Checked):
    """The embedded models."""

    tokenizer_iterations: int = 3000
    """Of 64 images each."""
    clip_iterations: int = 1500
    """Of 128 images each."""
    detector_iterations: int = 2000
    """Of 128 images each."""
    generator_iterations: int = 3400
    """Of `pretrain_batch_size` images each, in every cycle."""
    generator_cycles: int = 2
    """Times the generator's learning rate warms up and falls again, each time from half the height."""
    pretrain_batch_size: int = 128
    """Images an iteration of the generator."""
    pretrain_learning_rate: float = 2e-3
    """Of the generator (Muon and AdamW)."""
    width: int = 192
    """Of the generator's transformer."""
    depth: int = 6
    """Blocks of the generator's transformer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "tokenizer_iterations",
            "clip_iterations",
            "detector_iterations",
            "generator_iterations",
            "generator_cycles",
        ):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        self._require(self.pretrain_batch_size >= 1, "pretrain_batch_size", "at least 1")
        self._require(self.width % 16 == 0, "width", "a multiple of 16 (4 heads of rotary pairs)")


@dataclass(frozen=True, kw_only=True)
class RunConfig(_Checked):
    """All settings of one run, made from a preset and flat knobs."""

    preset: str = "emoji"
    """Named start."""
    generator: str = "emoji"
    """Which model: emoji, tiny, amused:<folder>, meissonic:<folder> or maskgit:<file>."""
    negative_prompt: str = ""
    """What guidance leads away from (amused, meissonic)."""
    time_conditioning: Literal["auto", "step_index", "mask_ratio"] = "auto"
    """How Meissonic is told the time; `auto` is step_index, as in its sampling pipeline."""
    text_encoder: str = ""
    """Meissonic: folder of another CLIP text model; empty for the checkpoint's own."""
    prompt_file: str = ""
    """Training prompts of one's own, .txt, .jsonl, .tsv or .csv; empty for EmojiScenes, or all ImageNet classes."""
    device: str = "auto"
    """`auto` takes CUDA where there is one."""
    matmul_precision: Literal["highest", "medium"] = "highest"
    """Of float32 products in training; `medium` multiplies in bfloat16, 1.6x faster where a CPU can."""
    compiled: bool = False
    """Run the network by torch.compile (emoji, tiny): about a third less time, after first calls that compile for one
    or two minutes, some 20 s where a process before left its kernels. Equal up to rounding, so that a seed can draw
    other tokens. A CPU needs a C++ compiler."""
    train: TrainConfig = TrainConfig()
    distillation: DistillConfig = DistillConfig()
    evaluation: EvalConfig = EvalConfig()
    pretrain: PretrainConfig = PretrainConfig()

    @classmethod
    def from_flat(cls, preset: str | None = None, **knobs: Any) -> "RunConfig":
        """Start from a preset (default: environment variable SPEEDRL_PRESET, else "emoji"), set knobs.

        A knob that is None stays as the preset says. Raises ValueError for an unknown preset and
        TypeError for an unknown or mistyped knob; both name the nearest valid one.
        """
        from speedrl_lab.presets import PRESETS

        preset = preset or os.environ.get("SPEEDRL_PRESET") or "emoji"
        if preset not in PRESETS:
            known = list(PRESETS)
            raise ValueError(
                f"unknown preset {preset!r}; nearest: {nearest(preset, known)!r} (one of {', '.join(known)})"
            )
        config = PRESETS[preset]
        owners = flat_fields()
        for name in knobs:
            if name not in owners:
                raise TypeError(f"unknown parameter {name!r}; nearest: {nearest(name, list(owners))!r}")
        knobs = {name: value for name, value in knobs.items() if value is not None}
        train = config.train
        changes = {
            owner: {
                name: _typed(name, value, owners[name][1]) for name, value in knobs.items() if owners[name][0] is owner
            }
            for owner in (SamplerConfig, TrainConfig, DistillConfig, EvalConfig, PretrainConfig, RunConfig)
        }
        sampler = replace(train.sampler, **changes[SamplerConfig])
        return replace(
            config,
            preset=preset,
            train=replace(train, sampler=sampler, **changes[TrainConfig]),
            distillation=replace(config.distillation, **changes[DistillConfig]),
            evaluation=replace(config.evaluation, **changes[EvalConfig]),
            pretrain=replace(config.pretrain, **changes[PretrainConfig]),
            **changes[RunConfig],
        )

    def flat(self) -> dict[str, Any]:
        """Every field and value in one dictionary."""
        parts = (self, self.train, self.train.sampler, self.distillation, self.evaluation, self.pretrain)
        return {f.name: getattr(part, f.name) for part in parts for f in fields(part) if f.name not in _NESTED}

    def to_json(self) -> str:
        """The flat settings as JSON; `from_flat(**json.loads(text))` gives the same config."""
        return json.dumps(self.flat(), indent=1, default=dict)

    def _repr_markdown_(self) -> str:
        from speedrl_lab.presets import PRESETS

        base = PRESETS[self.preset].flat()
        changed = {name: value for name, value in self.flat().items() if base[name] != value}
        lines = [f"**preset `{self.preset}`**" + (", changed:" if changed else ", nothing changed")]
        lines += [f"- `{name}` = `{value}` (preset: `{base[name]}`)" for name, value in changed.items()]
        return "\n".join(lines)


_NESTED = ("sampler", "train", "distillation", "evaluation", "pretrain")


def flat_fields() -> dict[str, tuple[type, Any]]:
    """Every settable name with its class and type; names are unique over all classes."""
    table: dict[str, tuple[type, Any]] = {}
    for owner in (RunConfig, TrainConfig, SamplerConfig, DistillConfig, EvalConfig, PretrainConfig):
        hints = get_type_hints(owner)
        table |= {f.name: (owner, hints[f.name]) for f in fields(owner) if f.name not in _NESTED}
    return table


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value as the field's type; TypeError in one line where it does not fit."""
    origin = get_origin(kind)
    if origin is tuple and isinstance(value, list | tuple) and all(type(v) is int for v in value):
        return tuple(value)
    if origin is Mapping and isinstance(value, Mapping):
        return dict(value)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    if origin is Literal and isinstance(value, str):
        return value
    label = getattr(kind, "__name__", str(kind)) if origin is None else str(kind).replace("typing.", "")
    raise TypeError(f"parameter {name}={value!r} has type {type(value).__name__}, expected {label}")
