"""Backbones: open_clip models by name or folder, with weights by tag, from a file, or random."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from transclip_fast.encode import eva, networks
from transclip_fast.encode.architectures import (
    FOLDER_CONFIG,
    hub_remedy,
    known_tags,
    model_folder,
    network_config,
    preprocessing_of,
    tokenizer_files,
    tokenizer_of,
    unknown,
)
from transclip_fast.encode.patches import LocalEncoder
from transclip_fast.encode.pixels import RESIZE, Box, Pixels, rgb
from transclip_fast.encode.weights import (
    WatchedFiles,
    cached_files,
    checkpoint_files,
    checkpoint_in,
    read_checkpoint,
)
from transclip_fast.errors import InputError, one_line
from transclip_fast.progress_bar import announced
from transclip_fast.store.arrays import file_sha256

RANDOM = "none"  # pretrained: random weights from a fixed seed
TOKENIZER = "tokenizer_sha256"  # entry of an identity
NOT_FINITE_REMEDIES = {
    "fp16": "give --precision bf16 or fp32, and a new --out",
    "bf16": "give --precision fp32, and a new --out",
    "fp32": "the weights are damaged, copy them again or take an earlier checkpoint",
}


@dataclass
class Backbone:
    """
    An image tower and a text tower, ready to encode.

    `model` has `encode_image` (B, 3, H, W) -> (B, d) and `encode_text` (B, L) -> (B, d).
    `preprocess` turns a PIL image into a tensor (3, H, W) float32, `tokenizer` a list of strings
    into token ids (B, L) int64. `identity` has all that decides the features, as in the manifest,
    and of a model folder `TOKENIZER`, which decides those of texts alone.
    """

    model: Any
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[Sequence[str]], torch.Tensor]
    identity: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32  # of the images that the image tower takes
    pixels: Pixels | None = None  # replaces `preprocess` if it is of the usual kind, and is faster
    local: LocalEncoder | None = None  # embeds patches as well as images
    weights: WatchedFiles = field(default_factory=lambda: WatchedFiles({}))

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
    def read(self) -> Callable[[bytes, Box | None], torch.Tensor]:
        """A function of an image file's content, and of a box to cut, to what `embed` takes."""
        if self.pixels is not None:
            return self.pixels.read
        return functools.partial(_preprocessed, self.preprocess)

    @property
    def not_finite(self) -> str:
        """How an error describes an embedding that is not finite, with the remedy."""
        precision = self.identity.get("precision", "fp32")
        return f"not finite in {precision}; {NOT_FINITE_REMEDIES[precision]}"

    def embed(self, images: torch.Tensor, batch_size: int) -> torch.Tensor:
        """
        Embeddings (B, *shape) of images (B, ...) that `read` returned, computed asynchronously.

        Smaller batches are padded: products of another size may differ in their last bits, and
        torch compiles a tower anew for each size.
        """
        number, images = len(images), self._moved(images)
        if number < batch_size:
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


def _preprocessed(
    preprocess: Callable[[Any], torch.Tensor], data: bytes, box: Box | None = None
) -> torch.Tensor:
    return preprocess(rgb(data, box))


def load_backbone(
    model: str,
    pretrained: str | None,
    device: torch.device,
    precision: str = "fp32",
    compiled: bool = False,
    identity: Mapping[str, Any] | None = None,
    allow_hub: bool = False,
    weights: WatchedFiles | None = None,
) -> Backbone:
    """
    Load an open_clip model in evaluation mode; the parameters are those of `encode_images`.

    With the `identity` that `identify` returned, the checkpoint is not hashed again. The weights
    are watched from now on, or since `watch_weights` returned `weights`.

    Raises
    ------
    InputError
        Unknown model or tag (with the nearest names); a checkpoint that does not load, or holds
        NaN or what the precision cannot represent; a folder's configuration that names parts on
        the hub without `allow_hub`.
    """
    origin = f"model {model}" + ("" if pretrained is None else f", pretrained {pretrained}")
    weights = weights or watch_weights(model, pretrained)
    identity = {**(identity or identify(model, pretrained, precision, compiled))}
    ours = model_folder(model) is not None or (eva.CONFIGS / f"{model}.json").is_file()
    try:
        with _without_log(), announced(f"loading {origin}"):
            if pretrained in known_tags(model) or (pretrained == RANDOM and not ours):
                parts = _from_open_clip(model, str(pretrained), identity, precision, device)
            else:
                parts = _from_files(model, pretrained, precision, device, allow_hub)
    except InputError:
        raise
    except Exception as error:  # of open_clip, its model hub, and what they load
        raise InputError(f"{origin}: does not load ({one_line(error)})") from error
    net, preprocess, tokenizer, preprocessing = parts
    _check_finite(net, origin, precision)
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
    if not weights.states:  # those of a tag may not have been on disk before
        weights = watch_weights(model, pretrained)
    return Backbone(net, preprocess, tokenizer, identity, dtype, pixels, weights=weights)


def _check_finite(net: Any, origin: str, precision: str) -> None:
    """Refuse weights of a damaged checkpoint; those too large for fp16 show in the embeddings."""
    for name, tensor in net.state_dict().items():
        bad = tensor.isnan() if precision == "fp16" else ~tensor.isfinite()
        if bad.any():
            remedy = NOT_FINITE_REMEDIES["fp32"]
            raise InputError(f"{origin}: weight {name} has values that are not finite; {remedy}")


def _from_files(
    model: str, pretrained: str | None, precision: str, device: torch.device, allow_hub: bool
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Network, preprocessing, tokenizer, and the manifest's description of the preprocessing."""
    from open_clip.transform import image_transform_v2

    file = None if pretrained == RANDOM else _weights_file(model, pretrained)
    net = networks.empty_network(network_config(model, allow_hub), precision)
    if file is None:
        networks.draw_weights(net, device)
    else:
        watched = WatchedFiles.of(checkpoint_files(file))
        with watched.in_use():
            networks.load_weights(net, read_checkpoint(file), str(file), device)
    cfg = preprocessing_of(model, file, net.visual.image_size)
    preprocess = image_transform_v2(cfg, is_train=False)
    return net, preprocess, tokenizer_of(model), asdict(cfg)


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

    # A file that is not in the cache is downloaded below, and any other error comes again there.
    with suppress(OSError, ValueError, RuntimeError), _hub_cache_only():
        return create()
    origin = f"model {model}, pretrained {pretrained}"
    repository = open_clip.get_pretrained_cfg(model, pretrained).get("hf_hub")
    no_network = f"{origin}: cannot be downloaded from here; {hub_remedy(repository or '')}"
    if repository and not _hub_has_an_address():
        raise InputError(no_network)
    try:
        with announced(f"downloading {origin}"):
            return create()
    except RuntimeError as error:
        if not repository or "download" not in str(error):
            raise
        raise InputError(no_network) from error


def _hub_has_an_address() -> bool:
    """False without a network, at once: a download would be tried again for over a minute."""
    from huggingface_hub import constants

    if getproxies():  # which knows addresses that this machine does not
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, "https"))
    except OSError:
        return False


@contextmanager
def _hub_cache_only() -> Iterator[None]:
    """Take files of the model hub from its cache, without asking it whether they are current."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _without_log() -> Iterator[None]:
    """Libraries log random weights, every retry of a download, and errors before they raise."""
    level = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(level)


def watch_weights(model: str, pretrained: str | None) -> WatchedFiles:
    """Watch a model folder's configuration and the files of its weights, also of a tag's."""
    import open_clip

    folder = model_folder(model)
    files = [] if folder is None else [folder / FOLDER_CONFIG]
    if pretrained in known_tags(model):
        files += cached_files(open_clip.get_pretrained_cfg(model, str(pretrained)))
    elif pretrained != RANDOM:
        files += checkpoint_files(_weights_file(model, pretrained))
    return WatchedFiles.of(files)


def identify(
    model: str, pretrained: str | None, precision: str = "fp32", compiled: bool = False
) -> dict[str, Any]:
    """
    The identity of a backbone as far as it is known before loading.

    Model, weights (tag or file hash), activation, precision, whether compiled, a folder's
    tokenizer. A checkpoint file does not name its activation: QuickGELU follows the model's name
    ("ViT-B-32-quickgelu") or the folder's configuration. InputError if the model, the tag or the
    file does not exist.
    """
    import open_clip

    folder, tags = model_folder(model), known_tags(model)
    quick_gelu = False
    if pretrained == RANDOM or pretrained in tags:
        known = open_clip.get_pretrained_cfg(model, pretrained) if pretrained in tags else {}
        weights, quick_gelu = pretrained, bool(known.get("quick_gelu", False))
    else:
        files = checkpoint_files(_weights_file(model, pretrained))
        with announced(f"reading {files[0]}"):
            hashes = [file_sha256(file) for file in files]
        whole = hashlib.sha256("".join(hashes).encode()).hexdigest()
        weights = hashes[0] if len(hashes) == 1 else whole
    return {
        "model": model if folder is None else file_sha256(folder / FOLDER_CONFIG),
        "weights": weights,
        "quick_gelu": quick_gelu,
        "precision": precision,
        "compiled": compiled,
        **({} if folder is None else {TOKENIZER: _hash_of(tokenizer_files(folder))}),
    }


def _hash_of(files: Sequence[Path]) -> str:
    """Hash of the names and contents of files."""
    found = "".join(f"{file.name!a} {file_sha256(file)}\n" for file in files)
    return hashlib.sha256(found.encode()).hexdigest()


def _weights_file(model: str, pretrained: str | None) -> Path:
    folder = model_folder(model)
    if pretrained is None:
        if folder is None:
            raise InputError(f"model {model} needs --pretrained: a tag, a checkpoint file, or none")
        return checkpoint_in(folder)
    if os.path.isfile(pretrained):
        return Path(pretrained)
    if Path(pretrained).suffix or "/" in pretrained:
        raise InputError(f"{pretrained}: no such file")
    raise unknown(pretrained, [*known_tags(model), RANDOM], f"weights for {model}")
