"""The inference loop of clip-retrieval (MIT), unchanged, around a network of ours.

`TRANSCLIP_CLIP_RETRIEVAL` names a checkout of rom1504/clip-retrieval; it needs pandas too. Its
reader, mapper, runner and writer run unchanged. Its mapper loads a model through `all_clip` and
imports `sentence_transformers`: stubs replace both, so that both arms embed by one network.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any

from transclip_fast.encode.models import Backbone

VARIABLE = "TRANSCLIP_CLIP_RETRIEVAL"


def available() -> bool:
    """Return whether the environment names a checkout."""
    return bool(os.environ.get(VARIABLE))


def encode(backbone: Backbone, images: Path, out: Path, batch_size: int, workers: int) -> None:
    """Encode the images of a folder into `out`, with clip-retrieval's loop."""
    reader, mapper, runner, writer = _modules()

    def read(sampler: Any) -> Any:
        return reader.FilesReader(
            sampler,
            backbone.preprocess,
            None,
            str(images),
            batch_size,
            workers,
            enable_text=False,
        )

    def embed() -> Any:
        return mapper.ClipMapper(
            enable_image=True,
            enable_text=False,
            enable_metadata=False,
            use_mclip=False,
            clip_model=backbone.model,
            use_jit=False,
            mclip_model=None,
        )

    def write(partition: int) -> Any:
        return writer.NumpyWriter(partition, str(out), False, True, False, 1)

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        runner.Runner(read, embed, write, lambda _: _Silent(), 1)(0)


class _Silent:
    """A logger that records nothing."""

    def start(self) -> None: ...

    def end(self) -> None: ...

    def __call__(self, _: Any) -> None: ...


def _modules() -> list[Any]:
    root = Path(os.environ[VARIABLE]) / "clip_retrieval"
    if "clip_retrieval" not in sys.modules:
        package = types.ModuleType("clip_retrieval")  # its own imports a server
        package.__path__ = [str(root)]
        inference = types.ModuleType("clip_retrieval.clip_inference")
        inference.__path__ = [str(root / "clip_inference")]
        loader: Any = types.ModuleType("all_clip")
        loader.load_clip = lambda clip_model, **_: (clip_model, None, None)
        sentences: Any = types.ModuleType("sentence_transformers")
        sentences.SentenceTransformer = None
        for module in (package, inference, loader, sentences):
            sys.modules[module.__name__] = module
    names = ("reader", "mapper", "runner", "writer")
    return [importlib.import_module(f"clip_retrieval.clip_inference.{name}") for name in names]
