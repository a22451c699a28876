"""
The image tower of EVA-CLIP-8B in plain torch, for a machine without timm and open_clip.

Modules have timm's names, so that a test can copy weights between the two.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

EPS = 1e-6
WEIGHT_STD = 0.02
PATCH = 14  # pixels a side
MLP_RATIO = 5  # hidden width over width


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (B, L, 3, heads, head width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed: torch.Tensor = self.proj(
            scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return mixed


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=EPS) for _ in range(2))
        self.attn, self.mlp = Attention(width, heads), Mlp(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        out: torch.Tensor = x + self.mlp(self.norm2(x))
        return out


class EvaTower(nn.Module):
    """
    Images (B, 3, side, side) to the class token (B, width) behind the last norm.

    Weights are not initialised: `draw` or load them.
    """

    def __init__(
        self,
        width: int = 4096,
        layers: int = 32,
        heads: int = 32,
        side: int = 224,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.tokens = (side // PATCH) ** 2 + 1
        with torch.device("meta"):
            self.patch_embed = nn.Module()
            self.patch_embed.proj = nn.Conv2d(3, width, PATCH, PATCH)
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
            self.pos_embed = nn.Parameter(torch.empty(1, self.tokens, width))
            self.blocks = nn.ModuleList(
                Block(width, heads, MLP_RATIO * width) for _ in range(layers)
            )
            self.norm = nn.RMSNorm(width, eps=EPS)
        self.to(dtype).to_empty(device=device)

    def draw(self, seed: int) -> EvaTower:
        """Draw random weights on the tower's device."""
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name:
                    parameter.fill_(1)
                else:
                    parameter.normal_(std=WEIGHT_STD)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        proj = self.patch_embed.get_submodule("proj")
        x = proj(images).flatten(2).transpose(1, 2)  # (B, L - 1, width)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.norm(x[:, 0])
        return out

    def operations(self) -> float:
        """Return the operations of an image: two a weight and token, and the attention."""
        weights = sum(p.numel() for p in self.parameters() if p.ndim in (2, 4))
        width, layers = self.norm.weight.numel(), len(self.blocks)
        return float(2 * weights * self.tokens + 4 * layers * self.tokens**2 * width)


def eva_error(device: str, **shape: int) -> float:
    """Return the largest error of two layers in bfloat16 over the largest output in float64."""
    shape = {**shape, "layers": 2}
    tower = EvaTower(**shape, device=device, dtype=torch.bfloat16).draw(1)
    exact = EvaTower(**shape, device=device, dtype=torch.float64)
    exact.load_state_dict(tower.state_dict())
    side = shape.get("side", 224)
    images = torch.randn(2, 3, side, side, device=device).bfloat16()
    with torch.inference_mode():
        truth = exact(images.double())
        return float((tower(images).double() - truth).abs().max() / truth.abs().max())
