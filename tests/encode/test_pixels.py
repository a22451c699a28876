"""Pixels of our own reading against open_clip's preprocessing with Pillow."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from transclip_fast.encode import pixels as module
from transclip_fast.encode.pixels import Pixels, decode, rgb

SIZE = 24


@pytest.fixture(params=sorted({"Pillow", module.decoder()}), autouse=True)
def decoder(request, monkeypatch):
    """Every test with each decoder that is installed."""
    monkeypatch.setattr(module, "decoder", lambda: request.param)


def made(width, height, mode="RGB"):
    """A picture with edges and slopes, not noise: what cameras take."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 5 + y / 11), np.cos(x / 17 - y / 3), (x + y) % 40 / 20 - 1]
    array = np.stack([127.5 + 127 * wave for wave in waves], 2).astype(np.uint8)
    return Image.fromarray(array).convert(mode)


def file(image, kind="JPEG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def both(data, **config):
    """Our pixels and open_clip's, both scaled, (3, S, S)."""
    cfg = PreprocessCfg(size=SIZE, **config)
    pixels = Pixels.of(vars(cfg))
    return pixels.scale(pixels.read(data)[None])[0], image_transform_v2(cfg, False)(rgb(data))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}]
)
def test_jpegs_are_pillows_to_the_last_bit(mode, options):
    data = file(made(61, 47, mode), **options)
    np.testing.assert_array_equal(decode(data).permute(1, 2, 0), np.asarray(rgb(data)))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_other_files_are_pillows(kind, mode):
    data = file(made(61, 47, mode), kind)
    np.testing.assert_array_equal(decode(data).permute(1, 2, 0), np.asarray(rgb(data)))


@pytest.mark.parametrize(
    "shape", [(61, 47), (47, 61), (24, 24), (24, 90), (7, 11), (301, 33), (1, 5)]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_within_one_level_of_open_clip(shape, kind, interpolation):
    ours, theirs = both(
        file(made(*shape), kind),
        interpolation=interpolation,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    )
    assert ours.shape == theirs.shape == (3, SIZE, SIZE)
    std = torch.tensor((0.2, 0.3, 0.4))[:, None, None]
    levels = (ours - theirs).abs() * std * 255
    assert levels.max() < 1.001
    assert levels.mean() < 0.05


def test_scaling_is_torchvisions_to_the_last_bit():
    ours, theirs = both(file(made(SIZE, SIZE), "PNG"))
    assert torch.equal(ours, theirs)


def test_orientation_is_left_alone_as_pillow_does():
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    ours, theirs = both(file(made(61, 47), exif=exif.tobytes()))
    assert (ours - theirs).abs().max() < 0.1


def test_damage_raises_what_pillow_raises():
    data = file(made(200, 200))
    for broken in (data[: len(data) // 2], b"no picture", b""):
        with pytest.raises(OSError) as ours:  # noqa: PT011 - Pillow's words
            decode(broken)
        with pytest.raises(OSError) as theirs:  # noqa: PT011
            rgb(broken)
        assert str(ours.value)[:20] == str(theirs.value)[:20]


@pytest.mark.parametrize(
    "config",
    [{"resize_mode": "squash"}, {"resize_mode": "longest"}, {"interpolation": "random"},
     {"size": (224, 336)}],
)  # fmt: skip
def test_other_preprocessing_is_left_to_open_clip(config):
    assert Pixels.of(vars(PreprocessCfg(**config))) is None


def test_what_travels_is_bytes_and_what_is_computed_has_channels_last():
    pixels = Pixels(SIZE, (0, 0, 0), (1, 1, 1), "bicubic")
    images = torch.stack([pixels.read(file(made(61, 47), kind)) for kind in ("JPEG", "PNG")])
    assert (images.dtype, images.shape) == (torch.uint8, (2, SIZE, SIZE, 3))
    assert images.is_contiguous()
    assert pixels.scale(images).is_contiguous(memory_format=torch.channels_last)
