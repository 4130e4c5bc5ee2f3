"""Named starts of `RunConfig.from_flat`: the embedded task, and the published models with their sources.

What is published of a model is how to sample from it: steps, guidance, temperatures. How Speed-RL trained Meissonic
(arXiv 2512.01094) is not, so that rates and sizes of training are taken from its neighbours, named where they stand.
The published samplers reveal by confidence; here the order is Halton, whose probability is exact, and a pace head
chooses the steps. Every one of them wants its weights named: generator="amused:<folder>".
"""

from dataclasses import replace

from speedrl_lab.config import EvalConfig, RunConfig, SamplerConfig, TrainConfig


def _embedded() -> dict[str, RunConfig]:
    """EmojiScenes on a CPU, from seconds to a quarter of an hour, and on a GPU."""
    emoji = RunConfig(
        matmul_precision="medium",
        train=TrainConfig(
            sampler=SamplerConfig(steps=8, order="halton", schedule="paced"),
            iterations=300,
            kl_estimator="exact",
            kl_weight=0.01,
            quality_weights={"clip": 1.0, "coherence": 1.0, "novelty": 0.4},
            speed_weight=0.5,
        ),
    )
    demo = replace(
        emoji,
        preset="demo",
        train=replace(
            emoji.train, iterations=60, learning_rate=2e-4, warmup_iterations=4, practice_steps=(2, 1, 4),
            sampler=replace(emoji.train.sampler, revise=True, power=2.0, temperature=0.8, start_noise=0.05),
            quality_weights={"verified": 1.5, "coherence": 0.7, "clip": 0.3, "variety": 0.7}, kl_weight=0.03,
            speed_form="lagrangian", speed_weight=0.5, target_steps=3.5, ema_decay=0.9,
        ),
        evaluation=replace(emoji.evaluation, budgets=(1, 2, 3, 4, 5, 8, 16), num_prompts=64, num_seeds=2),
    )  # fmt: skip
    sweep = replace(
        emoji,
        preset="sweep",
        train=replace(emoji.train, iterations=24, num_groups=6, learning_rate=5e-5, warmup_iterations=3),
        evaluation=replace(emoji.evaluation, num_prompts=16, num_seeds=1),
    )
    smoke = replace(
        emoji,
        preset="smoke",
        train=replace(emoji.train, iterations=3, num_groups=2, group_size=4, warmup_iterations=1, save_every=2),
        distillation=replace(emoji.distillation, distill_iterations=3, distill_batch_size=8, pool_size=8),
        evaluation=replace(emoji.evaluation, budgets=(1, 2, 4), num_prompts=12, num_seeds=2),
        pretrain=replace(
            emoji.pretrain, tokenizer_iterations=3, clip_iterations=3, detector_iterations=3,
            generator_iterations=3, generator_cycles=1, pretrain_batch_size=8, width=32, depth=1,
        ),
    )  # fmt: skip
    gpu = replace(
        emoji,
        preset="emoji-gpu",
        train=replace(emoji.train, num_groups=48, group_size=16, micro_batch_size=768),
        pretrain=replace(emoji.pretrain, generator_iterations=20000, generator_cycles=1, pretrain_batch_size=256),
    )
    return {"smoke": smoke, "sweep": sweep, "demo": demo, "emoji": emoji, "emoji-gpu": gpu}


SHARED = TrainConfig(
    iterations=400,  # MaskFocus (arXiv 2512.18766), GRPO on Meissonic: 1200 updates of 2 samples a prompt
    num_groups=8,
    group_size=8,  # MaskGRPO (2510.02880): 9; Show-o's Mask-GRPO: 6; below 8 the group's mean is noisy
    warmup_iterations=20,
    learning_rate=1e-4,  # of adapters: 3e-5 to 3e-4 among peers (Flow-GRPO, DanceGRPO); whole networks take 2e-6
    kl_weight=0.01,  # MaskFocus and MaskGRPO
    kl_estimator="cross_entropy",  # "a low-variance cross-entropy KL estimator": our reading of Speed-RL's abstract
    lora_rank=16,  # the default of diffusers' training script of aMUSEd; what it reaches: `lora_targets` of a family
    policy_dtype="bfloat16",
    quality_weights={"hpsv2.1": 1.0, "imagereward": 1.0, "open_clip": 1.0},  # the three of Speed-RL; z-scored first
    speed_weight=0.5,
)
"""What the published models have in common."""


def _published() -> dict[str, RunConfig]:
    """aMUSEd (arXiv 2401.01808), Meissonic (2410.08261) and MaskGIT with Halton order (2503.17076), for a GPU."""
    # AmusedPipeline's defaults: 12 steps, guidance 10, noise of the confidences falling from 2 to 0, tokens drawn at
    # temperature 1. choice_temperature acts where order="confidence".
    drawn = SamplerConfig(steps=12, guidance_scale=10.0, choice_temperature=2.0, order="halton", schedule="paced")
    amused = RunConfig(
        preset="amused-256",
        generator="amused:",
        train=replace(SHARED, sampler=drawn, micro_batch_size=32),  # 256 tokens
        evaluation=EvalConfig(budgets=(2, 4, 8, 12), num_prompts=64),
    )
    larger = replace(
        amused,
        preset="amused-512",
        train=replace(amused.train, gradient_checkpointing=True),  # 1024 tokens
    )
    # Meissonic's pipeline: 48 steps, guidance 9, noise from 2 to 0; its scripts take 64 steps. MaskFocus trained it
    # with guidance 5, which leaves the samples of a prompt more different.
    told = replace(drawn, steps=48, guidance_scale=5.0)
    meissonic = RunConfig(
        preset="meissonic",
        generator="meissonic:",
        train=replace(
            SHARED, sampler=told, num_groups=4, micro_batch_size=4, learning_rate=5e-5,  # 4096 tokens, 1.0e9 weights
            gradient_checkpointing=True, estimator="critical",  # half of the steps are scored, as in MaskFocus
        ),
        evaluation=EvalConfig(budgets=(4, 8, 16, 48), num_prompts=64),
    )  # fmt: skip
    # Halton-MaskGIT: 32 steps, and for its large network at 384 pixels w = 0.5, which is s = 1 + w here. Captions are
    # names of classes; ImageReward and HPSv2.1 were fitted to longer ones.
    maskgit = RunConfig(
        preset="maskgit",
        generator="maskgit:",
        train=replace(
            SHARED, sampler=replace(drawn, steps=32, guidance_scale=1.5), micro_batch_size=16,
            quality_weights={"open_clip": 1.0},
        ),
        evaluation=EvalConfig(budgets=(4, 8, 16, 32), num_prompts=64),
    )  # fmt: skip
    return {config.preset: config for config in (amused, larger, meissonic, maskgit)}


PRESETS: dict[str, RunConfig] = _embedded() | _published()
