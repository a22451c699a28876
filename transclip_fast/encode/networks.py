"""open_clip networks built without weights, then filled from a checkpoint mapped from disk."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch

from transclip_fast.encode import eva
from transclip_fast.errors import InputError
from transclip_fast.store.tensors import unmapped

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOT_ENCODING = frozenset({"logit_scale", "logit_bias"})  # encoding does without them
SIZED = {  # tensors with a row for each position
    "visual.positional_embedding": "images are of another size",
    "positional_embedding": "texts are of another length",
    "text.positional_embedding": "texts are of another length",
}
SHOWN_NAMES = 5  # of tensors, in a message
RANDOM_STD = 0.02  # of random weights, as in CLIP's token embedding

StateDict = dict[str, torch.Tensor]


def empty_network(config: Mapping[str, Any], precision: str = "fp32") -> Any:
    """
    Build a network whose parameters are on the meta device, where they take no memory.

    `config` is a model configuration of open_clip. Parameters get the types that open_clip's
    `create_model` gives them; buffers, and what is computed from shapes, are real.
    """
    import open_clip
    from accelerate import init_empty_weights

    parts: dict[str, Any] = deepcopy(dict(config))
    for tower, pretrained in (("vision_cfg", "timm_model"), ("text_cfg", "hf_model")):
        if f"{pretrained}_name" in parts[tower]:
            parts[tower][f"{pretrained}_pretrained"] = False
    custom_text = parts.pop("custom_text", False) or "hf_model_name" in parts["text_cfg"]
    kind: Any = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    if custom_text and "multimodal_cfg" in parts:
        kind = open_clip.CoCa
    with init_empty_weights(include_buffers=False):
        net = kind(**parts, cast_dtype=open_clip.get_cast_dtype(precision))
    if precision != "fp32":
        _lower(net, PRECISIONS[precision], timm="timm_model_name" in parts["vision_cfg"])
    return net.eval()


def load_weights(net: Any, weights: StateDict, origin: str, device: torch.device) -> None:
    """
    Give a network of `empty_network` its weights, in its own types.

    Tensors are converted and copied to the device one at a time. On a CPU, too: they are mapped
    from a file that may be cut later. Errors are those of `match_weights` and `unmapped`.
    """
    wanted, loaded = net.state_dict(), {}
    for name, tensor in match_weights(net, weights, origin).items():
        loaded[name] = unmapped(tensor).to(device, wanted[name].dtype)
    for name in wanted.keys() - loaded.keys():
        loaded[name] = torch.zeros_like(wanted[name], device=device)
    net.load_state_dict(loaded, assign=True)
    net.to(device)


def draw_weights(net: Any, device: torch.device) -> None:
    """Give a network of `empty_network` random weights, drawn on their device."""
    draw = torch.Generator(device).manual_seed(0)
    drawn = {}
    for name, like in net.state_dict().items():
        tensor = torch.empty_like(like, device=device)
        if tensor.is_floating_point():
            tensor.normal_(std=RANDOM_STD, generator=draw)
        drawn[name] = tensor if like.is_meta else like.to(device)
    net.load_state_dict(drawn, assign=True)
    net.to(device)


def match_weights(net: Any, weights: StateDict, origin: str) -> StateDict:
    """
    Return the tensors of a checkpoint under the network's names, in the network's order.

    open_clip renames the formats it knows; EVA-CLIP's official names are renamed here. InputError
    if tensors are missing, of another shape, or more than the network has.
    """
    from open_clip import factory

    if eva.OFFICIAL_NAME in weights:
        weights = {eva.open_clip_name(name): tensor for name, tensor in weights.items()}
    weights = factory.convert_state_dict(net, dict(weights))
    if "positional_embedding" in weights and not hasattr(net, "positional_embedding"):
        weights = factory.convert_to_custom_text_state_dict(weights)
    weights.pop("text.transformer.embeddings.position_ids", None)  # of older transformers
    wanted = net.state_dict()
    for name in NOT_ENCODING & weights.keys() & wanted.keys():
        weights[name] = weights[name].reshape(wanted[name].shape)
    wrong = {
        "lacks": [name for name in wanted if name not in weights.keys() | NOT_ENCODING],
        "also has": [name for name in weights if name not in wanted.keys() | NOT_ENCODING],
        "has in other shapes": [
            f"{name} {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    if any(wrong.values()):
        reasons = "; ".join(f"it {what} {_listed(names)}" for what, names in wrong.items() if names)
        remedy = _size_remedy(weights, wanted)
        raise InputError(f"{origin}: is not a checkpoint of this model: {reasons}{remedy}")
    return {name: weights[name] for name in wanted if name in weights}


def _size_remedy(weights: StateDict, wanted: StateDict) -> str:
    """The model to name for a checkpoint of images or texts of another size."""
    names = (name for name in SIZED if name in weights.keys() & wanted.keys())
    found = [SIZED[name] for name in names if len(weights[name]) != len(wanted[name])]
    return f"; its {' and '.join(found)}: name the model of that size" if found else ""


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _lower(net: Any, dtype: torch.dtype, timm: bool) -> None:
    """Convert parameters as open_clip's create_model does; its layer norms stay in float32."""
    from open_clip.model import convert_weights_to_lp
    from open_clip.transformer import LayerNormFp32

    if not timm:
        convert_weights_to_lp(net, dtype)
        return
    net.to(dtype)
    for part in net.modules():
        if isinstance(part, LayerNormFp32):
            part.float()
