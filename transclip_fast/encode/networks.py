"""open_clip networks built without weights, and filled from a checkpoint that stays on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any

import torch

from transclip_fast.encode import eva
from transclip_fast.errors import InputError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNUSED = frozenset({"logit_scale", "logit_bias"})  # by encoding; not every checkpoint has them
SHOWN = 5
RANDOM_SPREAD = 0.02

State = dict[str, torch.Tensor]


def empty_network(config: Mapping[str, Any], precision: str = "fp32") -> Any:
    """
    A network whose parameters are on the meta device, where they take no memory.

    Parameters
    ----------
    config : mapping
        As open_clip's model configurations.
    precision : str
        One of `PRECISIONS`: types are what open_clip gives them under that name.
    """
    import open_clip

    parts: dict[str, Any] = deepcopy(dict(config))
    for tower, pretrained in (("vision_cfg", "timm_model"), ("text_cfg", "hf_model")):
        if f"{pretrained}_name" in parts[tower]:
            parts[tower][f"{pretrained}_pretrained"] = False
    custom_text = parts.pop("custom_text", False) or "hf_model_name" in parts["text_cfg"]
    towers: Any = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    if custom_text and "multimodal_cfg" in parts:
        towers = open_clip.CoCa
    with _parameters_on_meta():
        net = towers(**parts, cast_dtype=open_clip.get_cast_dtype(precision))
    if precision != "fp32":
        _lower(net, PRECISIONS[precision], timm="timm_model_name" in parts["vision_cfg"])
    return net.eval()


def load_weights(net: Any, weights: State, origin: str, device: torch.device) -> None:
    """
    Give a network of `empty_network` its weights, in its own types.

    On a CPU, tensors of the right type stay where they are, mapped from disk; otherwise one
    tensor at a time is converted or copied.

    Raises
    ------
    InputError
        Tensors that are missing, of another shape, or that the network does not have.
    """
    named = fitted(net, weights, origin)
    wanted = net.state_dict()
    found = {name: named[name].to(device, wanted[name].dtype) for name in named}
    for name in UNUSED & (wanted.keys() - found.keys()):
        found[name] = torch.zeros_like(wanted[name], device=device)
    net.load_state_dict(found, assign=True)
    net.to(device)


def draw_weights(net: Any, device: torch.device) -> None:
    """Give a network of `empty_network` random weights, drawn where they will be."""
    draw = torch.Generator(device).manual_seed(0)
    drawn = {}
    for name, like in net.state_dict().items():
        tensor = torch.empty_like(like, device=device)
        if tensor.is_floating_point():
            tensor.normal_(std=RANDOM_SPREAD, generator=draw)
        drawn[name] = tensor if like.is_meta else like.to(device)
    net.load_state_dict(drawn, assign=True)
    net.to(device)


def fitted(net: Any, weights: State, origin: str) -> State:
    """
    The tensors of a checkpoint under the network's names, in the network's order.

    Known formats of others are renamed as open_clip does, and the authors' of EVA-CLIP;
    positions learned at another resolution are interpolated.

    Raises
    ------
    InputError
        Tensors that are missing, of another shape, or that the network does not have.
    """
    from open_clip import factory

    if eva.OFFICIAL in weights:
        weights = {eva.open_clip_name(name): tensor for name, tensor in weights.items()}
    weights = factory.convert_state_dict(net, dict(weights))
    if "positional_embedding" in weights and not hasattr(net, "positional_embedding"):
        weights = factory.convert_to_custom_text_state_dict(weights)
    weights.pop("text.transformer.embeddings.position_ids", None)  # of older transformers
    with suppress(AssertionError, RuntimeError):  # of another width: told below
        factory.resize_pos_embed(weights, net)
        factory.resize_text_pos_embed(weights, net)
    wanted = net.state_dict()
    for name in UNUSED & weights.keys() & wanted.keys():
        weights[name] = weights[name].reshape(wanted[name].shape)
    missing = [name for name in wanted if name not in weights and name not in UNUSED]
    extra = [name for name in weights if name not in wanted and name not in UNUSED]
    other = [
        f"{name} {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    wrong = {"lacks": missing, "also has": extra, "has in other shapes": other}
    if missing or extra or other:
        told = "; ".join(f"it {what} {_listed(names)}" for what, names in wrong.items() if names)
        raise InputError(f"{origin}: is not a checkpoint of this model: {told}")
    return {name: weights[name] for name in wanted if name in weights}


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """
    Parameters that modules take on inside are on the meta device from then on.

    Unlike under `torch.device("meta")`, buffers and what is computed from shapes are real.
    """
    module: Any = torch.nn.Module
    register = module.register_parameter

    def on_meta(self: Any, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(self, name, parameter)

    module.register_parameter = on_meta
    try:
        yield
    finally:
        module.register_parameter = register


def _lower(net: Any, dtype: torch.dtype, timm: bool) -> None:
    """Types as open_clip's create_model leaves them: its layer norms stay in float32."""
    from open_clip.model import convert_weights_to_lp
    from open_clip.transformer import LayerNormFp32

    if not timm:
        convert_weights_to_lp(net, dtype)
        return
    net.to(dtype)
    for part in net.modules():
        if isinstance(part, LayerNormFp32):
            part.float()
