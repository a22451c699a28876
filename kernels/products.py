"""
F P^T on matrix units, which multiply 16 bits: float32 operands are split into two float16 parts.

    2^12 f = f_h + f_l,   2^e p = p_h + p_l,   e brings all of P below 2^15
    2^(12 + e) f . p = f_l . p_h + f_h . p_l + f_h . p_h

Two parts have 22 bits, so a product is off by some 2^-22 of itself, which also bounds f_l . p_l. A
matrix unit may truncate its sums: those of BLOCK_DIMS dimensions start at 0 and are added up by
float32 additions, as a float32 GEMM's are, but fewer of them. Hence the result is nearer to the
exact one. Method: Ootomo and Yokota, 2022, Recovering single precision accuracy from tensor cores.

Float16 features need one product: F p_h, in 2^e.

Shapes: F (N, d) float32, |f| < 16, or float16; P (K, d) float32; products (N, K) float32. Cost:
three products of 2 N K d operations in 16 bits, and N K d (1 / A + 1 / B) entries read from the
cache for tiles of A rows and B classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

FEATURE_EXPONENT = 12  # small entries of unit rows keep their digits in f_l
LARGEST_EXPONENT = 15  # of P: float16 ends at 2^16
FEATURE_SCALE = tl.constexpr(2.0**FEATURE_EXPONENT)
# Rows and classes of a tile, dimensions of a step, warps, stages of the pipeline: the largest tiles
# that spill nothing in the score kernel. AMD's 64 KB hold one stage.
LAUNCHES = {
    "sm_90": (128, 128, 64, 8, 3),
    "cuda": (64, 64, 64, 8, 3),
    "hip": (64, 64, 32, 8, 1),
}
SPLIT_DIMS = 32  # of a step, where each is a product of three


@dataclass(frozen=True)
class HalfWeights:
    """
    P in float16, for products with features of one type.

    Parameters
    ----------
    parts : Tensor (1, K, d) or (2, K, d) float16
        p_h, and p_l for float32 features.
    scale : Tensor () float32
        Power of two by which the products are to be multiplied.
    """

    parts: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, weights: torch.Tensor, dtype: torch.dtype) -> HalfWeights:
        """P (K, d) float32, for features of that type."""
        exponent = torch.frexp(weights.abs().max()).exponent - LARGEST_EXPONENT
        scaled = torch.ldexp(weights, -exponent)
        parts = [scaled.half()]
        if dtype == torch.float32:
            parts.append((scaled - parts[0].float()).half())
            exponent -= FEATURE_EXPONENT
        return cls(torch.stack(parts), torch.ldexp(torch.ones_like(scaled[0, 0]), exponent))

    @property
    def split(self) -> bool:
        """Whether they are for float32 features."""
        return len(self.parts) == 2


@triton.jit
def tile(
    features_ptr, start_of_row, weights_ptr, start_of_class, low_part, d,
    SPLIT: tl.constexpr, BLOCK_DIMS: tl.constexpr,
):  # fmt: skip
    """
    Scaled products (A, B) of rows and classes that start at these entries (A,), (B,) int64.

    `low_part` is the entry where p_l starts, if SPLIT.
    """
    i = tl.arange(0, BLOCK_DIMS)
    x = tl.zeros((start_of_row.shape[0], start_of_class.shape[0]), tl.float32)
    for step in range(0, d, BLOCK_DIMS):
        within = step + i < d
        f = tl.load(
            features_ptr + start_of_row[:, None] + (step + i)[None, :], within[None, :], other=0.0
        )
        p_ptr = weights_ptr + start_of_class[None, :] + (step + i)[:, None]
        p_high = tl.load(p_ptr, within[:, None], other=0.0)
        if SPLIT:
            p_low = tl.load(p_ptr + low_part, within[:, None], other=0.0)
            f *= FEATURE_SCALE
            f_high = f.to(tl.float16)
            f_low = (f - f_high.to(tl.float32)).to(tl.float16)
            part = tl.dot(f_low, p_high)
            part = tl.dot(f_high, p_low, part)
            x += tl.dot(f_high, p_high, part)
        else:
            x = tl.dot(f, p_high, x, input_precision="ieee")
    return x


@triton.jit
def product_kernel(
    features_ptr, weights_ptr, scale_ptr, out_ptr, n_rows, n_classes, d,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_DIMS: tl.constexpr,
):  # fmt: skip
    """One tile of the products of float32 features."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.program_id(0) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    # Rows and classes beyond the last one copy it.
    start_of_row = tl.minimum(row, n_rows - 1) * d
    start_of_class = tl.minimum(k, n_classes - 1).to(tl.int64) * d
    low_part = tl.full((), n_classes, tl.int64) * d
    x = tile(
        features_ptr, start_of_row, weights_ptr, start_of_class, low_part, d, True, BLOCK_DIMS
    )  # fmt: skip
    mask = (row < n_rows)[:, None] & (k < n_classes)[None, :]
    tl.store(out_ptr + row[:, None] * n_classes + k[None, :], x * tl.load(scale_ptr), mask)


def launch(device: torch.device, *, split: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks of a tile on a device, and options of its kernel."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    name = "hip" if torch.version.hip else "sm_90" if hopper else "cuda"
    return launch_of(name, split=split)


def launch_of(name: str, *, split: bool) -> tuple[dict[str, int], dict[str, int]]:
    """`launch` on a kind of device, as in LAUNCHES."""
    rows, classes, dims, warps, stages = LAUNCHES[name]
    dims = min(dims, SPLIT_DIMS) if split else dims
    blocks = {"BLOCK_ROWS": rows, "BLOCK_CLASSES": classes, "BLOCK_DIMS": dims}
    return blocks, {"num_warps": warps, "num_stages": stages}


def product(features: torch.Tensor, weights: HalfWeights, out: torch.Tensor) -> torch.Tensor:
    """
    F P^T (n, K) in float32, into the first rows of `out`.

    Raises
    ------
    ValueError
        Features that are not contiguous.
    """
    if not features.is_contiguous():
        raise ValueError("features must be contiguous")
    out, (n_rows, d), n_classes = out[: len(features)], features.shape, out.shape[1]
    if weights.split:
        blocks, options = launch(features.device, split=True)
        grid = (
            triton.cdiv(n_classes, blocks["BLOCK_CLASSES"]),
            triton.cdiv(n_rows, blocks["BLOCK_ROWS"]),
        )
        product_kernel[grid](
            features, weights.parts, weights.scale, out, n_rows, n_classes, d, **blocks, **options
        )
        return out
    high = weights.parts[0].T
    if features.is_cuda:
        torch.mm(features, high, out_dtype=torch.float32, out=out)
    else:
        torch.mm(features.float(), high.float(), out=out)
    return out.mul_(weights.scale)
