"""What reward models do to pictures before they look: resize, crop or pad, normalise. On tensors, in batches."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of OpenAI's CLIP (arXiv 2103.00020); BLIP, HPS, PickScore and ImageReward took them over."""


@dataclass(frozen=True)
class Preprocess:
    """A model's published preprocessing, as its library does it with PIL but for the rounding to 8 bits.

    That rounding moves a channel by at most 2/255 before the division by `std`. Resizing is antialiased,
    in two passes, along rows first; newer PILs treat tall pictures along columns first, which differs
    where bicubic overshoots.
    """

    size: int
    """Pixels along both sides of the result."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    """The side that becomes `size`: the rest is cut off (shortest), padded in black (longest), or both
    sides do, whatever the shape (squash)."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    saturate: bool = True
    """Clip what bicubic resizing overshoots to [0, 1], as PIL does; HPS resizes floats and does not."""
    crop: Literal["even", "floor"] = "even"
    """Where the crop begins when an odd number of pixels goes: half of it rounded to an even number
    (torchvision, open_clip) or down (transformers)."""

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], any float type, to float32 (B, 3, size, size)."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as transforms

        height, width = images.shape[-2:]
        short, long = sorted((height, width))
        if self.resize == "squash":
            target = [self.size, self.size]
        elif self.resize == "shortest":
            target = [self.size * side // short for side in (height, width)]
        else:
            target = [round(self.size * side / long) for side in (height, width)]
        pixels = images.float()
        mode = InterpolationMode(self.interpolation)
        for sides in ([height, target[1]], target):  # PIL saturates between the passes
            if sides != list(pixels.shape[-2:]):
                pixels = transforms.resize(pixels, sides, mode, antialias=True)  # (B, 3, *sides)
            if self.saturate:
                pixels = pixels.clamp(0, 1)
        if self.resize == "shortest":
            top, left = (round(rest / 2) if self.crop == "even" else rest // 2 for rest in self._rest(pixels))
            pixels = pixels[:, :, top : top + self.size, left : left + self.size]
        rows, columns = (-rest for rest in self._rest(pixels))
        pixels = functional.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return transforms.normalize(pixels, list(self.mean), list(self.std))

    def _rest(self, pixels: Tensor) -> tuple[int, int]:
        """Rows and columns beyond `size`."""
        return pixels.shape[-2] - self.size, pixels.shape[-1] - self.size

    def __str__(self) -> str:
        shape = {
            "shortest": f"shortest side to {self.size} px, centre crop",
            "longest": f"longest side to {self.size} px, padded in black",
            "squash": f"both sides to {self.size} px",
        }[self.resize]
        mean, std = ("/".join(f"{value:.4f}" for value in values) for values in (self.mean, self.std))
        return f"{shape}, {self.interpolation} with antialiasing, mean {mean}, std {std}"
