"""
EVA-CLIP-8B and larger in open_clip's terms, with timm's `Eva` as image tower.

The sizes are published in baaivision/EVA, EVA-CLIP-18B/shinji/eva_clip (Sun
et al., "EVA-CLIP-18B: Scaling CLIP to 18 Billion Parameters", arXiv 2402.04252).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from transclip_fast.store.atomic import read_json

CONFIGS = Path(__file__).parent / "model_configs"
OFFICIAL_NAME = "visual.cls_token"  # a tensor of the authors' checkpoints, not of open_clip's


@functools.cache
def register_shipped() -> None:
    """Make the models of `model_configs` known to open_clip and timm."""
    for file in sorted(CONFIGS.glob("*.json")):
        register(file)


def register(file: Path) -> None:
    """
    Make the EVA-CLIP of a configuration file known to open_clip, and its trunk to timm.

    open_clip passes a timm trunk only its name, so the trunk is built here from the file's
    `vision_cfg`: `layers`, `width`, `head_width`, `mlp_ratio`, `patch_size`, `image_size`, and of
    `norm_kwargs` `eps` and `post` (norms follow attention and MLP instead of preceding them).
    """
    import open_clip
    import timm

    vision = read_json(file)["vision_cfg"]
    name = vision["timm_model_name"]
    if not timm.is_model(name):

        def trunk(**_: Any) -> Any:
            return _trunk(vision)

        trunk.__name__ = name  # timm registers it under this name
        timm.models.register_model(trunk)
    open_clip.add_model_config(file)


def _trunk(vision: dict[str, Any]) -> Any:
    """Image tower (B, 3, H, W) -> (B, width): the class token behind the last norm."""
    from timm.models.eva import Eva

    norm = vision["norm_kwargs"]
    trunk: Any = Eva(
        img_size=vision["image_size"],
        patch_size=vision["patch_size"],
        embed_dim=vision["width"],
        depth=vision["layers"],
        num_heads=vision["width"] // vision["head_width"],
        mlp_ratio=vision["mlp_ratio"],
        qkv_bias=False,
        # Torch's sums in float32 whatever the type, as the authors' does.
        norm_layer=functools.partial(torch.nn.RMSNorm, eps=norm["eps"]),
        use_post_norm=norm.get("post", False),
        global_pool="token",
        num_classes=0,
    )
    trunk.default_cfg = {}
    return trunk


def open_clip_name(name: str) -> str:
    """The name that open_clip gives a tensor of the authors' checkpoints."""
    if name == "text.logit_scale":
        return "logit_scale"
    tower, _, rest = name.partition(".")
    if tower != "visual":
        return name
    return f"visual.head.proj.{rest[5:]}" if rest.startswith("head.") else f"visual.trunk.{rest}"
