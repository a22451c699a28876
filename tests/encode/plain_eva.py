"""EVA-CLIP written out in plain torch from its description, float64: the truth of the tests."""

from __future__ import annotations

import json
import math

import torch

from transclip_fast.encode import eva
from transclip_fast.encode.architectures import network_config

EPS = 1e-6
HEADS, TEXT_HEADS = 3, 2
IMAGE, PATCH, WIDTH, LAYERS, MLP, DIM = 28, 7, 24, 3, 120, 10
TEXT, TEXT_LAYERS, WORDS, LENGTH = 16, 2, 49408, 77


def register_tiny(folder, post_norm):
    """Make an EVA-CLIP of the sizes above known; its name."""
    kind = "post" if post_norm else "pre"
    name = f"EVA-CLIP-tiny-{kind}"
    config = network_config("EVA-CLIP-18B" if post_norm else "EVA-CLIP-8B")
    config["embed_dim"] = DIM
    config["vision_cfg"] |= {
        "timm_model_name": f"eva_clip_tiny_{kind}", "image_size": IMAGE, "patch_size": PATCH,
        "width": WIDTH, "layers": LAYERS, "head_width": WIDTH // HEADS,
    }  # fmt: skip
    config["text_cfg"] |= {"width": TEXT, "heads": TEXT_HEADS, "layers": TEXT_LAYERS}
    (folder / f"{name}.json").write_text(json.dumps(config))
    eva.register(folder / f"{name}.json")
    return name


def embeddings(backbone, images, tokens):
    """Of a backbone, of images and of texts."""
    with torch.inference_mode():
        return backbone.model.encode_image(images), backbone.model.encode_text(tokens)


def rms_norm(x, weight):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * weight


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def attention(x, weight, bias, heads, mask=0):
    """Of x (B, L, d), with query, key and value weights stacked in (3 d, d)."""
    b, length, d = x.shape
    qkv = x @ weight.T + bias
    q, k, v = (part.reshape(b, length, heads, -1).transpose(1, 2) for part in qkv.split(d, -1))
    scores = q @ k.transpose(-1, -2) / math.sqrt(d // heads) + mask
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(b, length, d)


def image_embedding(w, images, *, heads, patch, post_norm=False):
    """Images (B, 3, H, W) to (B, d), from the tensors of an official checkpoint."""
    w = {name.removeprefix("visual."): t for name, t in w.items() if name.startswith("visual.")}
    b, _, height, width = images.shape
    tiles = images.reshape(b, 3, height // patch, patch, width // patch, patch)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 3 * patch * patch)
    x = tiles @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(b, -1, -1), x], 1) + w["pos_embed"]
    for layer in range(sum(name.endswith("attn.qkv.weight") for name in w)):
        p = {n.removeprefix(f"blocks.{layer}."): t for n, t in w.items()}

        def attend(x, p=p):
            mixed = attention(x, p["attn.qkv.weight"], 0, heads)
            return mixed @ p["attn.proj.weight"].T + p["attn.proj.bias"]

        def mlp(x, p=p):
            hidden = gelu(x @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"])
            return hidden @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]

        if post_norm:
            x = x + rms_norm(attend(x), p["norm1.weight"])
            x = x + rms_norm(mlp(x), p["norm2.weight"])
        else:
            x = x + attend(rms_norm(x, p["norm1.weight"]))
            x = x + mlp(rms_norm(x, p["norm2.weight"]))
    return rms_norm(x, w["norm.weight"])[:, 0] @ w["head.weight"].T


def text_embedding(w, tokens, *, heads):
    """Tokens (B, L) to (B, d): CLIP's text transformer, read at the largest token."""
    w = {name.removeprefix("text."): t for name, t in w.items() if name.startswith("text.")}
    length = tokens.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"]
    for layer in range(sum(name.endswith("in_proj_weight") for name in w)):
        p = {n.removeprefix(f"transformer.resblocks.{layer}."): t for n, t in w.items()}
        normed = layer_norm(x, p["ln_1.weight"], p["ln_1.bias"])
        mixed = attention(normed, p["attn.in_proj_weight"], p["attn.in_proj_bias"], heads, mask)
        x = x + mixed @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
        normed = layer_norm(x, p["ln_2.weight"], p["ln_2.bias"])
        hidden = gelu(normed @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"])
        x = x + hidden @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"]
    x = layer_norm(x, w["ln_final.weight"], w["ln_final.bias"])
    ends = tokens.argmax(1)
    return x[torch.arange(len(tokens)), ends] @ w["text_projection"]


def made_checkpoint():
    """An official checkpoint's names and shapes with random tensors, float32."""
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "logit_scale": (),
        "visual.cls_token": (1, 1, WIDTH),
        "visual.pos_embed": (1, (IMAGE // PATCH) ** 2 + 1, WIDTH),
        "visual.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "visual.patch_embed.proj.bias": (WIDTH,),
        "visual.norm.weight": (WIDTH,),
        "visual.head.weight": (DIM, WIDTH),
        "text.positional_embedding": (LENGTH, TEXT),
        "text.text_projection": (TEXT, DIM),
        "text.token_embedding.weight": (WORDS, TEXT),
        "text.ln_final.weight": (TEXT,),
        "text.ln_final.bias": (TEXT,),
    }
    for layer in range(LAYERS):
        for name, shape in {
            "norm1.weight": (WIDTH,),
            "attn.qkv.weight": (3 * WIDTH, WIDTH),
            "attn.proj.weight": (WIDTH, WIDTH),
            "attn.proj.bias": (WIDTH,),
            "norm2.weight": (WIDTH,),
            "mlp.fc1.weight": (MLP, WIDTH),
            "mlp.fc1.bias": (MLP,),
            "mlp.fc2.weight": (WIDTH, MLP),
            "mlp.fc2.bias": (WIDTH,),
        }.items():
            shapes[f"visual.blocks.{layer}.{name}"] = shape
    for layer in range(TEXT_LAYERS):
        for name, shape in {
            "ln_1.weight": (TEXT,),
            "ln_1.bias": (TEXT,),
            "attn.in_proj_weight": (3 * TEXT, TEXT),
            "attn.in_proj_bias": (3 * TEXT,),
            "attn.out_proj.weight": (TEXT, TEXT),
            "attn.out_proj.bias": (TEXT,),
            "ln_2.weight": (TEXT,),
            "ln_2.bias": (TEXT,),
            "mlp.c_fc.weight": (4 * TEXT, TEXT),
            "mlp.c_fc.bias": (4 * TEXT,),
            "mlp.c_proj.weight": (TEXT, 4 * TEXT),
            "mlp.c_proj.bias": (TEXT,),
        }.items():
            shapes[f"text.transformer.resblocks.{layer}.{name}"] = shape
    return {
        name: torch.randn(shape, generator=draw) / max(1, shape[-1] if shape else 1) ** 0.5
        for name, shape in shapes.items()
    }
