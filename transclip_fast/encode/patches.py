"""Local features: the patches of an image, embedded in the space of the image itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from transclip_fast.errors import InputError


@dataclass(frozen=True)
class LocalEncoder:
    """
    Images (B, 3, H, W) to (B, 1 + L, d): the image's embedding, and those of its L patches.

    Patches of a ViT leave the last block and take the norm and the projection of the class token;
    in CLIP's ResNets every place, not only the mean, is a query of attention pooling. Patches are
    averaged over a grid and come in reading order.

    Source: Chen et al. 2023, PLOT: Prompt Learning with Optimal Transport for Vision-Language
    Models, and the authors' repository (CHENGY12/PLOT), which has a ResNet's 7 x 7 places, and a
    ViT's patches in PLOT++.
    """

    visual: Any  # open_clip's image tower
    max_grid: int  # rows and columns that were asked for
    grid: tuple[int, int]  # rows and columns of patches; L is their product

    @classmethod
    def of(cls, net: Any, max_grid: int, name: str = "the model") -> LocalEncoder:
        """
        The encoder of a network's patches, at most `max_grid` rows and columns of them.

        InputError if the image tower has no patches in the space of its embeddings.
        """
        visual = getattr(net, "visual", None)
        places = _places(visual)
        if places is None:
            raise InputError(
                f"local features: the image tower of {name} gives none, only open_clip's own ViT "
                "(without attention pooling) and ResNet do; leave --local-features out"
            )
        return cls(visual, max_grid, (min(max_grid, places[0]), min(max_grid, places[1])))

    @property
    def n_patches(self) -> int:
        """L."""
        return self.grid[0] * self.grid[1]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        found = self.visual.forward_intermediates(
            images, indices=1, normalize_intermediates=True, output_fmt="NCHW"
        )
        places = found["image_intermediates"][-1]  # (B, width, h, w)
        if hasattr(self.visual, "attnpool"):
            places = _attended(self.visual.attnpool, places)
        else:
            places = torch.einsum("bchw,cd->bdhw", places, self.visual.proj)
        patches = F.adaptive_avg_pool2d(places, self.grid).flatten(2).mT  # (B, L, d)
        return torch.cat([found["image_features"][:, None], patches], 1)


def _places(visual: Any) -> tuple[int, int] | None:
    """Rows and columns of an image tower's last feature map; None if it has no usable one."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    if isinstance(visual, ModifiedResNet):
        side = math.isqrt(len(visual.attnpool.positional_embedding) - 1)
        return side, side
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        rows, columns = visual.grid_size
        return (rows, columns) if visual.proj is not None else None
    return None


def _attended(pool: Any, places: torch.Tensor) -> torch.Tensor:
    """Attention pooling (C to d) queried at each place of (B, C, h, w): (B, d, h, w)."""
    tokens = places.flatten(2).mT  # (B, hw, C)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)
    tokens = tokens + pool.positional_embedding.to(tokens.dtype)

    def heads(linear: Any) -> torch.Tensor:
        split: torch.Tensor = linear(tokens).unflatten(2, (pool.num_heads, -1))
        return split.transpose(1, 2)  # (B, heads, 1 + hw, C / heads)

    mixed = F.scaled_dot_product_attention(
        heads(pool.q_proj), heads(pool.k_proj), heads(pool.v_proj)
    )
    found: torch.Tensor = pool.c_proj(mixed.transpose(1, 2).flatten(2))[:, 1:]
    return found.mT.reshape(len(places), -1, *places.shape[2:])
