"""Pretraining of the embedded models: tokenizer, small CLIP, detector, masked generator.

Four short loops of the same shape. Each is a generator of records, draws its data from seeds that
depend on the iteration alone, keeps an atomic checkpoint, and goes on from it when called again.
What it leaves out on purpose: schedules other than linear warm-up and decay, several GPUs.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from speedrl_lab import scenes
from speedrl_lab.average import Average
from speedrl_lab.networks import Detector, MaskedTransformer, SmallClip, Tokenizer
from speedrl_lab.runs import read_checkpoint, write_checkpoint

EMA_DECAY = 0.999
CAPTION_DROP = 0.1
ROWS_MULTIPLE = 512


def fastest_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where this machine multiplies matrices clearly faster in it, else float32."""
    left, right = torch.ones(1024, 256, device=device), torch.ones(256, 1024, device=device)

    def seconds(dtype: torch.dtype) -> float:
        a, b = left.to(dtype), right.to(dtype)
        a @ b
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return torch.bfloat16 if seconds(torch.bfloat16) < 0.7 * seconds(torch.float32) else torch.float32


def _optimizers(network: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of transformer blocks, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in network.named_parameters():
        in_block = name.startswith("blocks.") and parameter.ndim == 2
        (matrices if in_block else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    ]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def _fit(
    network: nn.Module,
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    iterations: int,
    learning_rate: float,
    checkpoint: Path,
    device: torch.device,
    cycles: int = 1,
    save_every: int = 200,
) -> Iterator[dict[str, float]]:
    """Minimize `loss(iteration)` and yield a record an iteration; leaves the EMA weights in `network`.

    The learning rate warms up, stays, and falls to 0 over the second half of the iterations; each further
    cycle does the same again from half the height, and so starts from weights that are usable already.
    """
    average = Average(network, EMA_DECAY)
    optimizers = _optimizers(network, learning_rate)
    dtype = fastest_precision(device)
    start, length, iterations = 0, iterations, iterations * cycles
    if checkpoint.is_file():
        state = _read_checkpoint(checkpoint, device)
        if state["iterations"] != iterations:
            raise ValueError(
                f"{checkpoint} was started for {state['iterations']} iterations, now {iterations} are "
                "asked for; use the same number or another run name"
            )
        dtype = getattr(torch, state["precision"])  # a second timing might choose another
        network.load_state_dict(state["network"])
        average.load_state_dict({"updates": state["iteration"], "means": state["average"]})
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["iteration"]

    def save(iteration: int) -> None:
        state = {
            "iteration": iteration,
            "iterations": iterations,
            "precision": str(dtype).removeprefix("torch."),
            "network": network.state_dict(),
            "average": average.means,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, state)

    network.train()
    began = time.perf_counter()
    done = start
    try:
        for iteration in range(start, iterations):
            cycle, position = divmod(iteration, length)
            warm_up = min(1.0, (position + 1) / 100)
            decay = min(1.0, (length - position) / (0.5 * length))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * warm_up * decay / 2**cycle
            with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
                value, extra = loss(iteration)
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            average.update(network)
            done = iteration + 1
            if done % save_every == 0:
                save(done)
            yield {
                "iteration": done,
                "loss": float(value.detach()),
                "seconds": time.perf_counter() - began,
                **extra,
            }
        save(iterations)
    except (KeyboardInterrupt, GeneratorExit):  # stopped by a person, or by leaving the loop
        save(done)
        raise
    average.copy_to(network)
    network.eval()


def _read_checkpoint(path: Path, device: torch.device) -> dict:
    """The state in a pretraining checkpoint; ValueError in one line for any other file."""
    state = read_checkpoint(path, device)
    if not isinstance(state, dict) or not {"iteration", "precision", "optimizers"} <= state.keys():
        raise ValueError(f"{path} is no pretraining checkpoint of this project; remove it to start afresh")
    return state


Augmentation = Callable[[Tensor, torch.Generator], Tensor]
"""Images (B, 3, H, W) in [0, 1] and a generator to images of the same shape."""


def degrade(images: Tensor, rng: torch.Generator) -> Tensor:
    """Noise, blur and contrast of random strength, so that a judge does not hang on single pixels."""
    rows = len(images)
    level = torch.rand(rows, 3, 1, 1, generator=rng)
    noisy = images + 0.06 * level[:, :1] * torch.randn(images.shape, generator=rng)
    blurred = functional.avg_pool2d(functional.pad(noisy, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mixed = noisy.lerp(blurred, 0.6 * level[:, 1:2])
    return (mixed + 0.08 * (level[:, 2:] - 0.5)).clamp(0, 1)


def displace(images: Tensor, rng: torch.Generator) -> Tensor:
    """Colour jitter, a shift of up to 2 pixels and a cut-out square: nothing that `degrade` does.

    The answers stay as they are: centres move by less than any relation turns on.
    """
    rows, _, height, width = images.shape
    gain = 1 + 0.2 * (torch.rand(rows, 3, 1, 1, generator=rng) - 0.5)
    offset = 0.1 * (torch.rand(rows, 3, 1, 1, generator=rng) - 0.5)
    jittered = images * gain + offset
    down, right = torch.randint(5, (2, rows), generator=rng)
    padded = functional.pad(jittered, (2, 2, 2, 2), mode="replicate")  # (B, 3, H + 4, W + 4)
    across = (right[:, None] + torch.arange(width))[:, None, None].expand(rows, 3, height + 4, width)
    along = (down[:, None] + torch.arange(height))[:, None, :, None].expand(rows, 3, height, width)
    shifted = padded.gather(3, across).gather(2, along)  # (B, 3, H, W)
    most = torch.tensor([8, height, width]).view(3, 1, 1, 1, 1)
    side, top, left = (torch.rand(3, rows, 1, 1, 1, generator=rng) * most).long()  # (B, 1, 1, 1) each
    ys, xs = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    square = (ys >= top) & (ys < top + side) & (xs >= left) & (xs < left + side)  # (B, 1, H, W)
    return torch.where(square, torch.rand(rows, 3, 1, 1, generator=rng), shifted).clamp(0, 1)


def train_tokenizer(
    tokenizer: Tokenizer, iterations: int, batch_size: int, checkpoint: Path, device: torch.device, seed: int
) -> Iterator[dict[str, float]]:
    """Autoencode real scenes with L1 + L2 on pixels; records `psnr` in dB."""

    def loss(iteration: int) -> tuple[Tensor, dict[str, float]]:
        images = scenes.draw_batch(batch_size, "train", seed + iteration)[2].to(device)
        values, _ = tokenizer.quantize(images)
        difference = tokenizer.decode_values(values).float() - images
        squared = difference.square().mean()
        psnr = -10 * float(squared.detach().log10())
        return difference.abs().mean() + 4 * squared, {"psnr": psnr}

    return _fit(tokenizer, loss, iterations, 2e-3, checkpoint, device)


def train_clip(
    clip: SmallClip, iterations: int, batch_size: int, checkpoint: Path, device: torch.device, seed: int
) -> Iterator[dict[str, float]]:
    """Contrast pictures with captions of the batch and with captions that differ in one word."""

    def loss(iteration: int) -> tuple[Tensor, dict[str, float]]:
        drawn, _, images = scenes.draw_batch(batch_size, "train", seed + iteration)
        rng = torch.Generator().manual_seed(seed + iteration)
        wrong = [scenes.alter(scene, rng).caption for scene in drawn]
        captions = [scene.caption for scene in drawn] + wrong
        text = clip.encode_text(scenes.encode_captions(captions).to(device))  # (2B, F)
        pictures = clip.encode_image(degrade(images, rng).to(device))  # (B, F)
        scores = pictures @ text.T * clip.log_scale.exp().clamp(max=100)  # (B, 2B)
        target = torch.arange(batch_size, device=device)
        # Two rows of a batch may share a caption: that is no mistake, so it is no negative either.
        same = torch.tensor([[a == b for b in captions] for a in captions[:batch_size]], device=device)
        same[target, target] = False
        by_picture = scores.masked_fill(same, -torch.inf)
        by_text = scores[:, :batch_size].masked_fill(same[:, :batch_size], -torch.inf).T
        value = functional.cross_entropy(by_picture, target) + functional.cross_entropy(by_text, target)
        right = (by_picture.argmax(1) == target).float().mean()
        return value / 2, {"accuracy": float(right)}

    return _fit(clip, loss, iterations, 1e-3, checkpoint, device)


def train_detector(
    detector: Detector,
    iterations: int,
    batch_size: int,
    checkpoint: Path,
    device: torch.device,
    seed: int,
    augment: Augmentation = degrade,
) -> Iterator[dict[str, float]]:
    """Learn counts, background colour and centres from real scenes; records exact-count `accuracy`.

    Two judges that shall err independently take different seeds, widths and augmentations.
    """

    def loss(iteration: int) -> tuple[Tensor, dict[str, float]]:
        _, layout, images = scenes.draw_batch(batch_size, "train", seed + iteration)
        rng = torch.Generator().manual_seed(seed + iteration)
        counts, centers = scenes.answers(layout)
        counts, centers = counts.to(device), centers.to(device)
        predicted, colors, places = detector(augment(images, rng).to(device))
        value = functional.cross_entropy(predicted.flatten(0, 1).float(), counts.flatten()) * 10
        value = value + 0.3 * functional.cross_entropy(colors.float(), layout.backgrounds.to(device))
        single = (counts == 1).float()[..., None]
        value = value + 3 * ((places.float() - centers).square() * single).sum() / single.sum()
        right = (predicted.argmax(-1) == counts).all(1).float().mean()
        return value, {"accuracy": float(right)}

    return _fit(detector, loss, iterations, 1e-3, checkpoint, device)


def train_generator(
    policy: MaskedTransformer,
    tokenizer: Tokenizer,
    iterations: int,
    batch_size: int,
    checkpoint: Path,
    device: torch.device,
    seed: int,
    learning_rate: float = 2e-3,
    cycles: int = 1,
) -> Iterator[dict[str, float]]:
    """Predict masked codes with cosine mask ratios (MaskGIT, arXiv 2202.04200); captions drop with 10%."""
    num_tokens = policy.image_position.shape[0]

    def loss(iteration: int) -> tuple[Tensor, dict[str, float]]:
        drawn, _, images = scenes.draw_batch(batch_size, "train", seed + iteration)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            codes = tokenizer.encode(images.to(device))  # (B, N)
        rng = torch.Generator().manual_seed(seed + iteration)
        words = scenes.encode_captions([scene.caption for scene in drawn])
        words[torch.rand(batch_size, generator=rng) < CAPTION_DROP] = 0
        # Stratified over the batch: every mask ratio appears in every iteration.
        position = (torch.arange(batch_size) + torch.rand(batch_size, generator=rng)) / batch_size
        num_masked = (torch.cos(position * torch.pi / 2) * num_tokens).ceil().clamp(min=1)
        rank = torch.rand(batch_size, num_tokens, generator=rng).argsort(1).argsort(1)
        masked = (rank < num_masked[:, None]).to(device)  # (B, N)
        tokens = torch.where(masked, policy.mask_id, codes)
        rows = masked.flatten().nonzero().flatten()
        # Few different shapes: CPU kernels are compiled anew for every one. Row 0 pads, and is ignored.
        padding = -len(rows) % ROWS_MULTIPLE
        target = functional.pad(codes.flatten()[rows], (0, padding), value=-100)
        logits = policy(tokens, words.to(device), functional.pad(rows, (0, padding)))  # (R, V)
        return functional.cross_entropy(logits, target, ignore_index=-100), {}

    return _fit(policy, loss, iterations, learning_rate, checkpoint, device, cycles)
