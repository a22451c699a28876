"""Backbones: open_clip models by name or folder, with weights by tag, from a file, or random."""

from __future__ import annotations

import difflib
import functools
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from transclip_fast.encode import eva, networks
from transclip_fast.encode.patches import LocalEncoder
from transclip_fast.encode.pixels import RESIZE, Pixels, rgb
from transclip_fast.encode.weights import checkpoint_files, checkpoint_in, read_checkpoint
from transclip_fast.errors import InputError, one_line
from transclip_fast.store.arrays import file_sha256, inside
from transclip_fast.store.atomic import read_json

RANDOM = "none"  # pretrained: random weights from a fixed seed
FOLDER_CONFIG = "open_clip_config.json"


@dataclass
class Backbone:
    """
    An image tower and a text tower, ready to encode.

    `model` has `encode_image` (B, 3, H, W) -> (B, d) and `encode_text` (B, L) -> (B, d).
    `preprocess` turns a PIL image into a tensor (3, H, W) float32, `tokenizer` a list of strings
    into token ids (B, L) int64. `identity` has all that decides the features, as in the manifest.
    """

    model: Any
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[Sequence[str]], torch.Tensor]
    identity: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32  # of the images that the image tower takes
    pixels: Pixels | None = None  # replaces `preprocess` if it is of the usual kind, and is faster
    compiled: bool = False  # whether torch compiles `encode_image`
    local: LocalEncoder | None = None  # embeds patches as well as images

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @functools.cached_property
    def dim(self) -> int:
        """d, the length of an embedding."""
        with torch.inference_mode():
            return int(self.model.encode_text(self.tokenizer(["a"]).to(self.device)).shape[1])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of an image's embedding: (d,), or (1 + L, d) with its L patches."""
        return (self.dim,) if self.local is None else (1 + self.local.n_patches, self.dim)

    @property
    def read(self) -> Callable[[bytes], torch.Tensor]:
        """A function of an image file's content to what `embed` takes, without the model."""
        if self.pixels is not None:
            return self.pixels.read
        return functools.partial(_preprocessed, self.preprocess)

    def embed(self, images: torch.Tensor, batch_size: int) -> torch.Tensor:
        """
        Embeddings (B, *shape) of images (B, ...) that `read` returned, computed asynchronously.

        Smaller batches of a compiled tower are padded, as torch compiles anew for each size.
        """
        number, images = len(images), self._moved(images)
        if self.compiled and number < batch_size:
            images = torch.cat([images, images.new_zeros(batch_size - number, *images.shape[1:])])
        if self.pixels is not None:
            images = self.pixels.scale(images)
        encode = self.local or self.model.encode_image
        embedded: torch.Tensor = encode(images.to(self.dtype))
        return embedded[:number]

    def _moved(self, images: torch.Tensor) -> torch.Tensor:
        """Images on the device; a GPU receives them while it computes."""
        if self.device.type != "cuda":
            return images.to(self.device)
        with torch.cuda.stream(self._arrivals):
            moved = images.to(self.device, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._arrivals)
        moved.record_stream(computing)
        return moved

    @functools.cached_property
    def _arrivals(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]


def _preprocessed(preprocess: Callable[[Any], torch.Tensor], data: bytes) -> torch.Tensor:
    return preprocess(rgb(data))


def load_backbone(
    model: str,
    pretrained: str | None,
    device: torch.device,
    precision: str = "fp32",
    compiled: bool = False,
    identity: Mapping[str, Any] | None = None,
) -> Backbone:
    """
    Load an open_clip model in evaluation mode; the parameters are those of `encode_images`.

    With the `identity` that `identify` returned, the checkpoint is not hashed again.

    Raises
    ------
    InputError
        Unknown model or tag (with the nearest names), or a checkpoint that does not load.
    """
    identity = {**(identity or identify(model, pretrained, precision, compiled))}
    ours = _folder(model) is not None or (eva.CONFIGS / f"{model}.json").is_file()
    try:
        if pretrained in _tags(model) or (pretrained == RANDOM and not ours):
            parts = _from_open_clip(model, str(pretrained), identity, precision, device)
        else:
            parts = _from_files(model, pretrained, precision, device)
    except InputError:
        raise
    except Exception as error:  # of open_clip, its model hub, and what they load
        origin = f"model {model}" + ("" if pretrained is None else f", pretrained {pretrained}")
        raise InputError(f"{origin}: does not load ({one_line(error)})") from error
    net, preprocess, tokenizer, preprocessing = parts
    net.eval()
    identity["preprocessing"] = preprocessing
    pixels = Pixels.of(preprocessing)
    if pixels is not None:
        identity["resize"] = RESIZE
    if device.type == "cuda":
        net.to(memory_format=torch.channels_last)
    if compiled:
        net.encode_image = torch.compile(net.encode_image, dynamic=False)
    dtype = networks.PRECISIONS[precision]
    return Backbone(net, preprocess, tokenizer, identity, dtype, pixels, compiled)


def network_config(model: str) -> dict[str, Any]:
    """The configuration of a model by name or folder, as `networks.empty_network` takes it."""
    import open_clip

    folder = _folder(model)
    if folder is None:
        return dict(open_clip.get_model_config(model))
    config = read_json(inside(folder, FOLDER_CONFIG))
    config = config.get("model_cfg", config)
    if not all(isinstance(config.get(part), dict) for part in ("vision_cfg", "text_cfg")):
        raise InputError(f"{folder / FOLDER_CONFIG}: has no vision_cfg and text_cfg")
    return dict(config)


def _from_files(
    model: str, pretrained: str | None, precision: str, device: torch.device
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Network, preprocessing, tokenizer, and the manifest's description of the preprocessing."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    net = networks.empty_network(network_config(model), precision)
    if pretrained == RANDOM:
        networks.draw_weights(net, device)
    else:
        file = _weights_file(model, pretrained)
        networks.load_weights(net, read_checkpoint(file), str(file), device)
    own, tokens, folder = {}, model, _folder(model)
    if folder is not None:
        own = read_json(inside(folder, FOLDER_CONFIG)).get("preprocess_cfg", {})
        tokens = f"local-dir:{folder}"
    merged = merge_preprocess_dict(PreprocessCfg(), {**own, "size": net.visual.image_size})
    cfg = PreprocessCfg(**merged)
    preprocess = image_transform_v2(cfg, is_train=False)
    return net, preprocess, open_clip.get_tokenizer(tokens), asdict(cfg)


def _from_open_clip(
    model: str, pretrained: str, identity: dict[str, Any], precision: str, device: torch.device
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The same of a model with a tag, or with open_clip's random weights."""
    import open_clip

    def create() -> tuple[Any, Any, Any, dict[str, Any]]:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            torch.manual_seed(0)
            net, _, preprocess = open_clip.create_model_and_transforms(
                model,
                pretrained=None if pretrained == RANDOM else pretrained,
                device=device,
                precision=precision,
                # Weights trained with QuickGELU load into any network, and are wrong in most.
                force_quick_gelu=identity["quick_gelu"],
            )
        preprocessing = open_clip.get_model_preprocess_cfg(net)
        return net, preprocess, open_clip.get_tokenizer(model), preprocessing

    try:
        with _hub_cache_only():
            return create()
    except (OSError, ValueError, RuntimeError):  # not in the cache; any other error comes again
        return create()


@contextmanager
def _hub_cache_only() -> Iterator[None]:
    """Take files of the model hub from its cache, without asking it whether they are current."""
    from huggingface_hub import constants

    before, level = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    constants.HF_HUB_OFFLINE = True
    logging.disable()  # of random weights, and of files that a second attempt will download
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.disable(level)


def identify(
    model: str, pretrained: str | None, precision: str = "fp32", compiled: bool = False
) -> dict[str, Any]:
    """
    The identity of a backbone as far as it is known before loading.

    Model, weights (tag or file hash), activation, precision, whether compiled. A checkpoint file
    does not name its activation: QuickGELU follows the model's name ("ViT-B-32-quickgelu") or the
    folder's configuration. InputError if the model, the tag or the file does not exist.
    """
    import open_clip

    folder, tags = _folder(model), _tags(model)
    quick_gelu = False
    if pretrained == RANDOM or pretrained in tags:
        known = open_clip.get_pretrained_cfg(model, pretrained) if pretrained in tags else {}
        weights, quick_gelu = pretrained, bool(known.get("quick_gelu", False))
    else:
        files = checkpoint_files(_weights_file(model, pretrained))
        hashes = [file_sha256(file) for file in files]
        whole = hashlib.sha256("".join(hashes).encode()).hexdigest()
        weights = hashes[0] if len(hashes) == 1 else whole
    return {
        "model": model if folder is None else file_sha256(folder / FOLDER_CONFIG),
        "weights": weights,
        "quick_gelu": quick_gelu,
        "precision": precision,
        "compiled": compiled,
    }


def _weights_file(model: str, pretrained: str | None) -> Path:
    folder = _folder(model)
    if pretrained is None:
        if folder is None:
            raise InputError(f"model {model} needs --pretrained: a tag, a checkpoint file, or none")
        return checkpoint_in(folder)
    if os.path.isfile(pretrained):
        return Path(pretrained)
    if Path(pretrained).suffix or "/" in pretrained:
        raise InputError(f"{pretrained}: no such file")
    raise _unknown(pretrained, [*_tags(model), RANDOM], f"weights for {model}")


def _tags(model: str) -> list[str]:
    import open_clip

    return [] if _folder(model) else open_clip.list_pretrained_tags_by_model(model)


def _folder(model: str) -> Path | None:
    """The folder of a model; None for a name that open_clip knows."""
    import open_clip

    eva.register_shipped()
    if model in open_clip.list_models():
        return None
    if not os.path.isdir(model):
        raise _unknown(model, open_clip.list_models(), "model")
    if not os.path.isfile(os.path.join(model, FOLDER_CONFIG)):
        raise InputError(f"{model}: has no {FOLDER_CONFIG}")
    return Path(model)


def _unknown(name: str, names: Sequence[str], what: str) -> InputError:
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.4)
    return InputError(f"unknown {what} {name!r}; nearest: {', '.join(near) or 'none'}")
