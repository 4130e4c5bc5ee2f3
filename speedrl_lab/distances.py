"""How far a set of pictures is from real scenes: torchmetrics' KID and FID on features of our own.

What a distance sees is what its features keep. A detector's last features hold content, and little of
noise or of stray patches, which it was trained to overlook; its first ones hold the surface.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional

from speedrl_lab.networks import Detector, ResidualBlock

BATCH = 256  # pictures read by the detector at once


class DetectorFeatures(nn.Module):
    """The detector's penultimate features, scaled to mean square 1 a picture, for torchmetrics."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector
        self.num_features = detector.config["features"]

    def forward(self, images: Tensor) -> Tensor:
        return functional.normalize(self.detector.features(images)) * self.num_features**0.5  # (B, F)


class SurfaceFeatures(nn.Module):
    """Channel means of the detector's first block, scaled to mean square 1 a picture: texture, not content."""

    def __init__(self, detector: Detector):
        super().__init__()
        layers = list(detector.tower.trunk)
        first = next(index for index, layer in enumerate(layers) if isinstance(layer, ResidualBlock))
        self.layers = nn.Sequential(*layers[: first + 1])
        self.num_features = detector.config["widths"][0]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        means = functional.silu(self.layers(images * 2 - 1)).mean((2, 3))  # (B, w0)
        return functional.normalize(means) * self.num_features**0.5


Features = DetectorFeatures | SurfaceFeatures


def kid(
    features: Features, real: Tensor, generated: Tensor, subset_size: int, subsets: int, seed: int
) -> tuple[float, float]:
    """Kernel inception distance (arXiv 1801.01401) on our features: mean and std over subsets.

    Images are float (B, 3, 32, 32) in [0, 1]. Raises ValueError if `subset_size` exceeds a set.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    if not 1 < subset_size <= min(len(real), len(generated)):
        raise ValueError(
            f"subset_size {subset_size} with {len(real)} real and {len(generated)} generated images; "
            f"use 2 to {min(len(real), len(generated))}"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save")
        metric = KernelInceptionDistance(features, subsets=subsets, subset_size=subset_size)
    _feed(metric, real, generated)
    with torch.random.fork_rng(devices=[]):  # subsets are drawn from the global CPU generator
        torch.default_generator.manual_seed(seed)
        mean, std = metric.compute()
    return mean.item(), std.item()


def frechet_distance(features: Features, real: Tensor, generated: Tensor) -> float:
    """Frechet distance (arXiv 1706.08500) on our features; images (B, 3, 32, 32) in [0, 1].

    Not FID: the features are not Inception's. Biased upwards for small sets: compare equal sizes only.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(features)
    _feed(metric, real, generated)
    return metric.compute().item()


def _feed(metric: nn.Module, real: Tensor, generated: Tensor) -> None:
    device = next(metric.parameters()).device
    metric.to(device)
    for images, is_real in ((real, True), (generated, False)):
        for batch in images.split(BATCH):
            metric.update(batch.to(device), real=is_real)
