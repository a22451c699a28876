"""Train the demo's CLIP on scikit-learn's handwritten digits, on one thread, in a few minutes.

The image tower first learns, without labels, to recognise a digit under mild changes (SimCLR);
then both towers learn from 100 captioned digits with CLIP's contrastive loss. DIR receives
`model.json`, `weights.safetensors`, `vocabulary.json` and `digits.npz`. Needs scikit-learn.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import save_file

from bench.common import command_line
from bench.demo.augment import augment
from transclip_fast import TransCLIP
from transclip_fast.demo.data import (
    CLASS_NAMES,
    DIGITS,
    SHIFTS,
    TEMPLATES,
    class_prompts,
    enlarge,
    image_hash,
)
from transclip_fast.demo.model import (
    CONFIG,
    VOCABULARY,
    WEIGHTS,
    TrimmedTokenizer,
    backbone,
    build,
    make_preprocess,
)
from transclip_fast.encode.models import Backbone
from transclip_fast.encode.text import encode_text
from transclip_fast.store.atomic import new_folder, write_json

# From 13 rows on the labels run 0..9 three times, and there are 13 writers: the file seems to be in
# the order of its forms. The parts are cut at such rows, so that they share no form.
VALIDATION_START, TEST_START = 646, 905
CAPTIONED_PER_CLASS = 10
CAPTIONS = (
    *TEMPLATES,
    "{}",
    "a photo of a {}.",
    "a photo of the number {}.",
    "an image of the number {}.",
    "a picture of a {}.",
    "a scan of the digit {}.",
    "the handwritten digit {}.",
)
CONTEXT_LENGTH = 16
MODEL: dict[str, Any] = {
    # With a small d the mixture's likelihood would be negligible beside the prior.
    "embed_dim": 512,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 32},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 64, "heads": 2, "layers": 2},
}
# TransCLIP scales cosines by CLIP's 100, and so does the loss. Without label smoothing the model is
# certain of everything at that scale, right or wrong.
LOGIT_SCALE = 100.0
LABEL_SMOOTHING = 0.1
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_TEMPERATURE, PRETRAIN_LR = 200, 128, 0.2, 1e-3
STEPS, SETS, LR = 100, 8, 5e-4
WEIGHT_DECAY = 0.05


class Split(NamedTuple):
    """Images (N, 8, 8) uint8 and labels (N,) of one part of the data."""

    images: np.ndarray
    labels: np.ndarray


def load_splits() -> dict[str, Split]:
    """Return the parts "training", "captioned" (100 of the training's), "validation" and "test"."""
    from sklearn.datasets import load_digits  # needed for training only

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(VALIDATION_START)
    captioned = np.concatenate(
        [order[labels[order] == k][:CAPTIONED_PER_CLASS] for k in range(len(CLASS_NAMES))]
    )
    parts = {
        "training": np.arange(VALIDATION_START),
        "captioned": captioned,
        "validation": np.arange(VALIDATION_START, TEST_START),
        "test": np.arange(TEST_START, len(images)),
    }
    return {name: Split(images[rows], labels[rows]) for name, rows in parts.items()}


def vocabulary() -> list[int]:
    """Return the ids, ascending, of open_clip's tokens in captions and prompts; 0 is padding."""
    texts = [caption.format(name) for caption in CAPTIONS for name in CLASS_NAMES]
    return sorted({0, *SimpleTokenizer(context_length=CONTEXT_LENGTH)(texts).flatten().tolist()})


def pretrain(model: CLIP, images: torch.Tensor, generator: torch.Generator) -> None:
    """Train the image tower so that two changed views of one image (N, 1, H, W) match."""
    head = torch.nn.Sequential(
        torch.nn.Linear(MODEL["embed_dim"], 256), torch.nn.ReLU(), torch.nn.Linear(256, 128)
    )
    parameters = [*model.visual.parameters(), *head.parameters()]
    optimizer, schedule = _optimizer(parameters, PRETRAIN_LR, PRETRAIN_STEPS)
    partner = torch.arange(2 * PRETRAIN_BATCH).roll(PRETRAIN_BATCH)
    for _ in range(PRETRAIN_STEPS):
        batch = images[torch.randperm(len(images), generator=generator)[:PRETRAIN_BATCH]]
        views = torch.cat([augment(batch, generator), augment(batch, generator)])
        rows = F.normalize(head(model.visual(_as_input(views))), dim=1)
        similarities = rows @ rows.T / PRETRAIN_TEMPERATURE
        similarities.fill_diagonal_(-torch.inf)
        _step(F.cross_entropy(similarities, partner), optimizer, schedule)


def contrast(
    model: CLIP, images: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator
) -> None:
    """
    Train both towers with CLIP's loss on sets of ten captioned digits, one of each class.

    With one image of each class in a set no caption fits two of its images.

    Parameters
    ----------
    images : Tensor (classes, images per class, 1, H, W)
    tokens : Tensor (captions, classes, context length)
    """
    n_classes, per_class = images.shape[:2]
    parameters = [p for p in model.parameters() if p is not model.logit_scale]
    optimizer, schedule = _optimizer(parameters, LR, STEPS)
    classes, labels = torch.arange(n_classes), torch.arange(n_classes).repeat(SETS)
    for _ in range(STEPS):
        image = torch.randint(per_class, (SETS, n_classes), generator=generator)
        caption = torch.randint(len(tokens), (SETS, n_classes), generator=generator)
        pictures = augment(images[classes, image].flatten(0, 1), generator)
        f = model.encode_image(_as_input(pictures), normalize=True)
        t = model.encode_text(tokens[caption, classes].flatten(0, 1), normalize=True)
        f, t = f.view(SETS, n_classes, -1), t.view(SETS, n_classes, -1)
        logits = LOGIT_SCALE * f @ t.mT
        loss = F.cross_entropy(logits.flatten(0, 1), labels, label_smoothing=LABEL_SMOOTHING)
        loss = loss + F.cross_entropy(
            logits.mT.flatten(0, 1), labels, label_smoothing=LABEL_SMOOTHING
        )
        _step(loss / 2, optimizer, schedule)


def train(splits: Mapping[str, Split], config: dict[str, Any], ids: list[int], seed: int) -> CLIP:
    """Return the model trained on the parts "training" and "captioned" alone."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build(config).to(memory_format=torch.channels_last).train()
    pretrain(model, _grey(splits["training"].images, config), generator)
    images = _grey(splits["captioned"].images, config)
    images = images.view(len(CLASS_NAMES), CAPTIONED_PER_CLASS, *images.shape[1:])
    tokenizer = TrimmedTokenizer(ids, CONTEXT_LENGTH)
    tokens = torch.stack([tokenizer([c.format(name) for name in CLASS_NAMES]) for c in CAPTIONS])
    contrast(model, images, tokens, generator)
    with torch.no_grad():
        model.logit_scale.fill_(np.log(LOGIT_SCALE))
    return model.eval()


def save(folder: Path, model: CLIP, config: dict[str, Any], ids: list[int]) -> None:
    """Write the model's three files, weights in fp16."""
    write_json(folder / CONFIG, config)
    write_json(folder / VOCABULARY, {"ids": ids})
    weights = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS)


def save_digits(folder: Path, splits: Mapping[str, Split]) -> None:
    """Write the test images, and the hashes of all other images."""
    seen = [*splits["training"].images, *splits["validation"].images]
    hashes = sorted(bytes.fromhex(image_hash(image)) for image in seen)
    np.savez_compressed(
        folder / DIGITS,
        images=splits["test"].images,
        labels=splits["test"].labels.astype(np.uint8),
        training_hashes=np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1),
    )


@torch.inference_mode()
def accuracies(demo: Backbone, split: Split) -> dict[str, tuple[float, float, float]]:
    """Return zero-shot accuracy, mean confidence and transductive accuracy in percent, by shift."""
    text = encode_text(demo, class_prompts())
    found = {}
    for name, shift in SHIFTS.items():
        images = [demo.preprocess(Image.fromarray(shift(enlarge(image)))) for image in split.images]
        features = demo.model.encode_image(torch.stack(images), normalize=True)
        fit = TransCLIP(device="cpu").fit(features, text_features=text)
        found[name] = (
            100 * float((fit.zero_shot_labels_ == split.labels).mean()),
            100 * float(fit.zero_shot_confidences_.mean()),
            100 * float((fit.transduction_ == split.labels).mean()),
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    """Train, write the files, print accuracies."""
    parser = command_line(__spec__, __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="the shipped files are of seed 0")
    parser.add_argument(
        "--test", action="store_true", help="print the test split's accuracies, too: for the end"
    )
    options = parser.parse_args(arguments)
    # One thread: the result does not depend on how many cores there are.
    torch.set_num_threads(1)
    splits, ids = load_splits(), vocabulary()
    config = {**MODEL, "text_cfg": {**MODEL["text_cfg"], "vocab_size": len(ids)}}
    started = time.perf_counter()
    model = train(splits, config, ids, options.seed)
    print(f"trained in {time.perf_counter() - started:.0f} s")
    with new_folder(options.out, frozenset({CONFIG, VOCABULARY, WEIGHTS, DIGITS})) as folder:
        save(folder, model, config, ids)
        save_digits(folder, splits)
    demo = backbone(options.out)
    for part in ("validation", "test")[: 1 + options.test]:
        for shift, (zero_shot, confidence, transductive) in accuracies(demo, splits[part]).items():
            print(
                f"{part} {shift}: zero-shot {zero_shot:.1f} % (confidence {confidence:.1f} %), "
                f"transductive {transductive:.1f} %"
            )


def _optimizer(
    parameters: list[torch.nn.Parameter], rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    return optimizer, schedule


def _step(
    loss: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    schedule.step()


def _grey(images: np.ndarray, config: dict[str, Any]) -> torch.Tensor:
    """Return images (N, 8, 8) in the model's size as (N, 1, H, W) in 0 .. 1."""
    preprocess = make_preprocess(config)
    inputs = torch.stack([preprocess(Image.fromarray(enlarge(image))) for image in images])
    grey: torch.Tensor = inputs[:, :1] * OPENAI_DATASET_STD[0] + OPENAI_DATASET_MEAN[0]
    return grey


def _as_input(images: torch.Tensor) -> torch.Tensor:
    """Return the model's input (N, 3, H, W) of grey images (N, 1, H, W) in 0 .. 1."""
    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    return (images - mean[:, None, None]) / std[:, None, None]


if __name__ == "__main__":
    main()
