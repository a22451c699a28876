"""Names of the arms and data sets in tables and plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Of `bench.speed.compare`, in the order of the table.
SPEED_ARMS = {
    "published": "published code",
    "baseline": "good dense torch",
    "baseline_compiled": "the same, compiled",
    "dense_torch": "transclip_fast: dense, torch",
    "sparse_torch": "transclip_fast: sparse, torch",
    "sparse_numba": "transclip_fast: sparse, numba",
    "sparse_triton": "transclip_fast: sparse, Triton",
    "default": "transclip_fast: as it comes",
}
SPARSE_ARMS = {
    "baseline": "a good dense torch version",
    "dense": "transclip_fast, dense",
    "sparse": "transclip_fast, sparse",
    "gemms": "the products of all rows and classes alone, in float32",
}
GRAPH_ARMS = {
    "faiss_exact avx2": "FAISS `knn`, AVX2",
    "faiss_exact avx512": "FAISS `knn`, AVX-512",
    "faiss_ivf avx2": "FAISS `IndexIVFFlat`, AVX2",
    "faiss_ivf avx512": "FAISS `IndexIVFFlat`, AVX-512",
    "faiss_big_batch avx2": "FAISS `big_batch_search`, AVX2",
    "faiss_big_batch avx512": "FAISS `big_batch_search`, AVX-512",
    "exact": "`--search exact`",
    "faiss": "`--search faiss`",
}
# Of `bench.accuracy.prompt_learners`.
LEARNERS = {
    "coop": "CoOp",
    "coop-class": "CoOp, a context a class",
    "prograd": "ProGrad",
    "cocoop": "CoCoOp",
    "plot": "PLOT, over prompts",
    "plot-crops": "PLOT, over crops",
}
NAMINGS = {"words": "other words", "permuted": "another digit's"}
FEATURES = {
    "whurs19_clip_rn50": "WHU-RS19, CLIP RN50",
    "whurs19_clip_vit-b-32": "WHU-RS19, CLIP ViT-B/32",
    "whurs19_clip_vit-l-14": "WHU-RS19, CLIP ViT-L/14",
    "oxford_pets_vitb32": "Oxford Pets, CLIP ViT-B/32",
    "dtd_vitb32": "DTD, CLIP ViT-B/32",
}


def most_memory(arm: dict[str, Any]) -> int:
    """Return the peak of an arm of `bench.speed.compare`, on the GPU where it ran on one."""
    return int(arm.get("device_peak_bytes") or arm["peak_bytes"])


def counted_cores(machine: Mapping[str, Any]) -> str:
    """Return the number of cores of a machine, in words."""
    return "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
