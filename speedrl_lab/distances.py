"""How far a set of pictures is from real scenes of the same captions: KID and FID on features of our own.

What a distance sees is what its features keep. A detector's last features hold content, and little of
noise or of stray patches, which it was trained to overlook; its first ones hold the surface.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from speedrl_lab.networks import Detector, ResidualBlock

BATCH = 256  # pictures read by the detector at once


class DetectorFeatures(nn.Module):
    """The detector's penultimate features, scaled to mean square 1 a picture, as KID's kernel expects."""

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


def read(features: DetectorFeatures | SurfaceFeatures, images: Tensor) -> Tensor:
    """Features, double (B, F), of images (B, 3, 32, 32) in [0, 1], a batch at a time."""
    return torch.cat([features(batch) for batch in images.split(BATCH)]).detach().double()


def kid(real: Tensor, generated: Tensor, real_captions: Sequence[str], captions: Sequence[str]) -> float:
    """Kernel inception distance (arXiv 1801.01401) of features (B, F), over pairs of pictures of different captions.

    One caption a row; torchmetrics' kernel. The usual estimate takes all pictures as independent draws, and pictures of
    one caption are not: real scenes of 128 captions were .018 from real scenes of others, farther than some models,
    and -.019 from real scenes of their own. Without pairs of one caption there is no such bias: real scenes are 0 away
    from others of the same captions, give or take .0004 (2026-11-30). Raises ValueError where all captions are alike.
    """
    from torchmetrics.image.kid import poly_kernel

    named = {caption: index for index, caption in enumerate(dict.fromkeys([*real_captions, *captions]))}
    sets = []
    for rows, texts in ((real, real_captions), (generated, captions)):
        if len(rows) != len(texts):
            raise ValueError(f"got {len(texts)} captions for {len(rows)} images; give one caption an image")
        sets.append((rows, torch.tensor([named[text] for text in texts], device=rows.device)))

    def mean(first: Tensor, ids: Tensor, second: Tensor, other: Tensor) -> Tensor:
        different = ids[:, None] != other  # (B, B')
        if not different.any():
            raise ValueError(f"all {len(ids) + len(other)} images have one caption; expected at least two captions")
        return poly_kernel(first, second)[different].mean()

    of_real, of_generated = sets
    return (mean(*of_real, *of_real) + mean(*of_generated, *of_generated) - 2 * mean(*of_real, *of_generated)).item()


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Frechet distance (arXiv 1706.08500, torchmetrics) of features (B, F).

    Not FID: the features are not Inception's. Biased upwards for small sets: compare equal sizes only.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    read_already = nn.Identity()
    read_already.num_features = real.shape[1]
    metric = FrechetInceptionDistance(read_already).to(real.device)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute().item()
