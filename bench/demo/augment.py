"""Mild random changes of images for training; none of them is a shift of the demo."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

ROTATION = math.radians(15)
SCALE, ASPECT, SHEAR = 0.15, 0.1, 0.15
TRANSLATION = 0.12  # of half the image
BEND = 0.06  # standard deviation of a 4 x 4 grid of displacements, of half the image
CONTRAST, NOISE = 0.2, 0.1


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Return images (N, 1, H, W) in 0 .. 1, turned, scaled, sheared, moved, bent, dimmed and noisy.

    Only the small changes of scale affect stroke width and sharpness.
    """
    n = len(images)

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    angle, scale, aspect = uniform(ROTATION), 1 + uniform(SCALE), uniform(ASPECT)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [
        [cos * (1 + aspect), uniform(SHEAR) - sin, uniform(TRANSLATION)],
        [sin, cos * (1 - aspect), uniform(TRANSLATION)],
    ]
    affine = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    bend = F.interpolate(
        BEND * normal(n, 2, 4, 4), images.shape[-2:], mode="bicubic", align_corners=False
    )
    moved = F.grid_sample(images, grid + bend.permute(0, 2, 3, 1), align_corners=False)
    brightness = (1 + uniform(CONTRAST))[:, None, None, None]
    noise = uniform(NOISE).abs()[:, None, None, None] * normal(*images.shape)
    return (brightness * moved + noise).clamp(0, 1)
