"""Models by name or folder: network, preprocessing and tokenizer, without their weights."""

from __future__ import annotations

import difflib
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import floordiv
from pathlib import Path
from typing import Any

from transclip_fast.encode import eva
from transclip_fast.errors import InputError
from transclip_fast.store.arrays import inside
from transclip_fast.store.atomic import read_json
from transclip_fast.store.json_text import value_of

FOLDER_CONFIG = "open_clip_config.json"
DEMO = "demo"  # the model of the package, for its demo
PARTS = ("vision_cfg", "text_cfg", "multimodal_cfg")
LARGEST = {  # sizes of networks, far beyond the largest there are
    "embed_dim": 2**16,
    "width": 2**16,
    "layers": 2**10,
    "heads": 2**10,
    "head_width": 2**14,
    "image_size": 2**13,
    "patch_size": 2**13,
    "context_length": 2**13,
    "vocab_size": 2**22,
}
MAX_PATCHES = 2**16  # of an image
CHANNELS = 3
LEAST_DEVIATION = 1e-6  # of a channel, that pixels are divided by
KNOWN = {  # values in a preprocessing
    "interpolation": ("bicubic", "bilinear", "random"),
    "resize_mode": ("shortest", "longest", "squash"),
    "mode": ("RGB",),
}
HUB_PREFIX = "hf-hub:"  # before the name of a repository of the Hugging Face hub
REMOTE_CODE = "trust_remote_code"  # an option of transformers: run the model's own Python files
SCHEME = re.compile(r"\s*(hf[-_]hub|local-dir):")  # of names outside a folder
FILE_OPTIONS = frozenset(  # of tokenizers, which take any path
    {"bpe_path", "vocab_file", "merges_file", "tokenizer_file", "gguf_file", "subfolder"}
)
TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".bpe", ".codes", ".spm", ".tiktoken", ".vocab")
PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")  # that weights decide


def model_folder(model: str) -> Path | None:
    """The folder of a model; None for a name that open_clip knows."""
    import open_clip

    eva.register_shipped()
    if model in open_clip.list_models():
        return None
    if model.startswith(HUB_PREFIX):
        raise InputError(f"{model}: {hub_remedy(model.removeprefix(HUB_PREFIX))}")
    if not os.path.isdir(model):
        if model == DEMO:
            raise InputError(
                f"model {DEMO}: is for the digits of `transclip-fast demo`, and for train-head, "
                "protocol and solve --head on features of these; name another model here"
            )
        raise unknown(model, open_clip.list_models(), "model")
    if not os.path.isfile(os.path.join(model, FOLDER_CONFIG)):
        raise InputError(f"{model}: has no {FOLDER_CONFIG}")
    return Path(model)


def known_tags(model: str) -> list[str]:
    """The weights that open_clip knows of a model."""
    import open_clip

    return [] if model_folder(model) else open_clip.list_pretrained_tags_by_model(model)


def network_config(model: str, allow_hub: bool = False) -> dict[str, Any]:
    """
    The configuration of a model by name or folder, as `networks.empty_network` takes it.

    InputError if a folder's configuration is none, or names parts on the Hugging Face hub or in
    another folder and these are not allowed.
    """
    import open_clip

    folder = model_folder(model)
    if folder is None:
        return dict(open_clip.get_model_config(model))
    content = read_json(inside(folder, FOLDER_CONFIG))
    config = content.get("model_cfg", content)
    parts = ("vision_cfg", "text_cfg")
    if not isinstance(config, dict) or not all(isinstance(config.get(p), dict) for p in parts):
        raise InputError(f"{folder / FOLDER_CONFIG}: has no vision_cfg and text_cfg")
    _check_sizes(config, folder / FOLDER_CONFIG)
    foreign = _without_code(config)
    if foreign and not allow_hub:
        raise InputError(
            f"{folder / FOLDER_CONFIG}: names {foreign[0]!r}, which would come from the Hugging "
            "Face hub or another folder; give --allow-hub if you trust it"
        )
    return config


def _without_code(config: dict[str, Any]) -> list[str]:
    """
    Remove, at any depth, a configuration's leave to run code; return what it names elsewhere.

    `hf_tokenizer_name` is no such name: a folder's tokenizer comes from its own files.
    """
    foreign, pending = list[str](), list[tuple[str, Any]]([("", config)])
    while pending:  # no recursion, as the file may be deeper than Python's stack
        key, value = pending.pop()
        if isinstance(value, dict):
            value.pop(REMOTE_CODE, None)
            pending += value.items()
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
        elif value and (
            key in ("hf_model_name", *FILE_OPTIONS)
            or (key == "timm_model_name" and ":" in str(value))
            or SCHEME.match(str(value))
        ):
            foreign.append(str(value))
    return foreign


def _check_sizes(config: Mapping[str, Any], file: Path) -> None:
    """Refuse sizes that no model has, before a network of them takes the memory or the time."""
    for part in (config, *(config.get(name) for name in PARTS)):
        if not isinstance(part, dict):
            continue
        for name, most in LARGEST.items():
            values = part.get(name)
            for value in values if isinstance(values, list) else [values]:
                if value is not None:  # as the patches of a convolutional network
                    value_of({name: value}, name, int, file, minimum=1, maximum=most)
    side, patch = (config["vision_cfg"].get(name) for name in ("image_size", "patch_size"))
    sides, patches = (x if isinstance(x, list) else [x, x] for x in (side, patch))
    known = None not in (*sides, *patches)
    if known and math.prod(map(floordiv, sides, patches)) > MAX_PATCHES:
        raise InputError(f"{file}: an image of {side} pixels has too many patches of {patch}")


def preprocessing_of(model: str, checkpoint: Path | None, image_size: Any) -> Any:
    """
    The preprocessing, a `PreprocessCfg`, of a model with weights from a file, or random ones.

    A folder's configuration has its own. A checkpoint of a known model gets what all of
    open_clip's weights of that model have; if they differ, open_clip's default, with a warning.
    """
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    folder = model_folder(model)
    if folder is None:
        own = _shared_preprocessing(model, checkpoint)
    else:
        own = _own_preprocessing(inside(folder, FOLDER_CONFIG))
    return PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), {**own, "size": image_size}))


def _own_preprocessing(file: Path) -> Mapping[str, Any]:
    """The preprocessing in a folder's configuration; values that are none are refused."""
    config = read_json(file)
    own = value_of(config, "preprocess_cfg", dict, file) if "preprocess_cfg" in config else {}
    for name in {"mean", "std"} & own.keys():
        channels = value_of(own, name, list, file)
        if len(channels) != CHANNELS:
            raise InputError(f"{file}: {name} has {len(channels)} values, expected {CHANNELS}")
        for value in channels:
            least = LEAST_DEVIATION if name == "std" else 0
            value_of({name: value}, name, float, file, minimum=least, maximum=1)
    for name, known in KNOWN.items():
        if name in own and own[name] not in known:
            raise InputError(f"{file}: {name} is {own[name]!r:.40}; known are {', '.join(known)}")
    return own


def _shared_preprocessing(model: str, checkpoint: Path | None) -> Mapping[str, Any]:
    import open_clip
    from open_clip.transform import PreprocessCfg

    known = [open_clip.get_pretrained_cfg(model, tag) for tag in known_tags(model)]
    own = [{name: cfg[name] for name in PREPROCESSING if name in cfg} for cfg in known]
    if not own or all(cfg == own[0] for cfg in own):
        return own[0] if own else {}
    if checkpoint is not None:
        default = asdict(PreprocessCfg())
        used = ", ".join(f"{name} {default[name]}" for name in PREPROCESSING)
        warnings.warn(
            f"{checkpoint}: does not name its preprocessing, and weights of {model} differ in it; "
            f"{used} is used, give a folder with an {FOLDER_CONFIG} if that is wrong",
            stacklevel=2,
        )
    return {}


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a model by name or folder; a folder's never runs code of its own."""
    import open_clip

    folder = model_folder(model)
    if folder is None:
        return open_clip.get_tokenizer(model)
    of_transformers = network_config(model, allow_hub=True)["text_cfg"].get("hf_tokenizer_name")
    # open_clip passes on a folder's tokenizer_kwargs; these replace them.
    safe = {REMOTE_CODE: False} if of_transformers else {}
    return open_clip.get_tokenizer(f"local-dir:{folder}", **safe)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model folder that a tokenizer may be in, sorted."""
    found = (file for file in folder.iterdir() if file.suffix in TOKENIZER_SUFFIXES)
    return sorted(filter(os.path.isfile, found))


def hub_remedy(repository: str) -> str:
    """The remedy where a repository of the Hugging Face hub cannot be downloaded from here."""
    return (
        f"download the repository https://huggingface.co/{repository.strip('/')} and give its "
        "folder as --model, without --pretrained"
    )


def unknown(name: str, names: Sequence[str], what: str) -> InputError:
    """An error that lists the nearest of the known names, if any is near."""
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return InputError(f"unknown {what} {name!r}{hint}")
