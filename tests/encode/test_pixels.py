"""Pixels of our own reading against open_clip's preprocessing with Pillow."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from transclip_fast.encode import pixels as module
from transclip_fast.encode.pixels import Pixels, decode, rgb
from transclip_fast.errors import InputError

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


def plain(data):
    """What Pillow alone makes of a file, with three channels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")


def both(data, **config):
    """Our pixels and open_clip's, both scaled, (3, S, S)."""
    cfg = PreprocessCfg(size=SIZE, **config)
    pixels = Pixels.of(vars(cfg))
    return pixels.scale(pixels.read(data)[None])[0], image_transform_v2(cfg, False)(plain(data))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}]
)
def test_jpegs_are_pillows_to_the_last_bit(mode, options):
    data = file(made(61, 47, mode), **options)
    np.testing.assert_array_equal(decode(data), plain(data))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_other_files_are_pillows(kind, mode):
    data = file(made(61, 47, mode), kind)
    np.testing.assert_array_equal(decode(data), plain(data))


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


# The sides of the picture that the first row and the first column of a file are, as in EXIF.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
@pytest.mark.parametrize("orientation", SIDES)
def test_images_are_turned_upright(kind, orientation):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    upright = np.asarray(made(61, 47))
    first_row, first_column = SIDES[orientation]
    taken = upright.transpose(1, 0, 2) if first_row in ("left", "right") else upright
    taken = taken[::-1] if first_row in ("bottom", "right") else taken
    taken = Image.fromarray(taken[:, ::-1] if first_column in ("bottom", "right") else taken)
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"save_all": True, "append_images": [taken]} if kind == "MPO" else {}
    data = file(taken, kind, exif=exif, lossless=True, quality=98, **options)
    found = decode(data)
    assert found.shape == (47, 61, 3)
    error = np.abs(found.astype(int) - upright).mean()
    assert error < 10 if kind in ("JPEG", "MPO", "AVIF") else error == 0
    np.testing.assert_array_equal(found, rgb(data))


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0nonsense", b"\0"])
def test_damaged_exif_does_not_turn(exif):
    data = file(made(61, 47), exif=exif)
    np.testing.assert_array_equal(decode(data), plain(data))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_does_not_turn(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = file(made(61, 47), exif=exif)
    np.testing.assert_array_equal(decode(data), plain(data))


def test_large_images_are_converted_in_bands(monkeypatch):
    files = [file(made(61, 47, mode), "PNG") for mode in ("RGB", "RGBA", "P", "LA", "1")]
    clear = made(61, 47, "P")
    files.append(file(clear, "PNG", transparency=3))
    files.append(file(Image.fromarray(np.asarray(made(61, 47, "L")).astype("f4")), "TIFF"))
    whole = [decode(data) for data in files]
    monkeypatch.setattr(module, "BAND_PIXELS", 5 * 61 + 7)
    for data, expected in zip(files, whole, strict=True):
        np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "CMYK", "L"])
def test_colours_are_pillows(mode):
    data = file(made(61, 47, mode), "TIFF" if mode == "CMYK" else "PNG")
    np.testing.assert_array_equal(decode(data), plain(data))


@pytest.mark.parametrize("shape", [(900, 20), (20, 900), (1, 90), (90, 1), (24, 500), (40, 641)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_strips_are_open_clips(shape, interpolation):
    ours, theirs = both(file(made(*shape), "PNG"), interpolation=interpolation)
    std = torch.tensor(PreprocessCfg().std)[:, None, None]
    assert ((ours - theirs).abs() * std * 255).max() < 1.001


def test_a_strip_takes_the_memory_of_a_square(monkeypatch):
    largest = []
    interpolate, resize = torch.nn.functional.interpolate, Image.Image.resize

    def counted(result):
        largest.append(np.asarray(result).size)
        return result

    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda *a, **k: counted(interpolate(*a, **k))
    )
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: counted(resize(*a, **k)))
    pixels = Pixels(224, (0, 0, 0), (1, 1, 1), "bicubic")
    for shape in ((20000, 1), (1, 20000), (16, 1), (17, 1), (65000, 3)):
        assert pixels.read(file(made(*shape), "PNG")).shape == (224, 224, 3)
    assert len(largest) == 5
    assert max(largest) <= 3 * 224 * 224 * module.STRIP


def test_too_many_pixels_are_refused_with_the_remedy():
    content = io.BytesIO()
    Image.new("1", (16000, 16000)).save(content, "PNG")
    with pytest.raises(InputError, match="has more than 178,956,970 pixels; scale it down"):
        decode(content.getvalue())


def test_more_pixels_than_a_file_of_that_size_has_are_refused():
    whole = file(made(61, 47), "BMP")
    claimed = whole[:18] + (12000).to_bytes(4, "little") * 2 + whole[26:]  # width and height
    with pytest.raises(InputError, match="claims 12,000 x 12,000 pixels in 8,7.. bytes"):
        decode(claimed)
    white = file(Image.new("L", (5000, 5000), 255), "PNG")
    assert (decode(white) == 255).all()


def test_damage_raises_what_pillow_raises():
    data = file(made(200, 200))
    for broken in (data[: len(data) // 2], b"no picture", b""):
        with pytest.raises(OSError) as ours:  # noqa: PT011 - Pillow's words
            decode(broken)
        with pytest.raises(OSError) as theirs:  # noqa: PT011
            plain(broken)
        assert str(ours.value)[:20] == str(theirs.value)[:20]


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG", "AVIF", "MPO"])
def test_more_pages_or_frames_than_one_are_noticed(kind):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    pages = [made(61, 47), made(47, 61).resize((61, 47))]
    assert not module.has_more_frames(file(pages[0], "JPEG" if kind == "MPO" else kind))
    data = file(pages[0], kind, save_all=True, append_images=pages[1:])
    assert module.has_more_frames(data) == (kind != "MPO")  # its second is a preview
    np.testing.assert_array_equal(decode(data), plain(data))


def test_a_second_frame_may_be_damaged():
    first = made(61, 47)
    data = file(first, "GIF", save_all=True, append_images=[made(47, 61).resize((61, 47))])
    second = data.rindex(b"\x2c\0\0\0\0")  # where its size begins
    for end in (second + 3, second + 9, second + 100):
        np.testing.assert_array_equal(decode(data[:end]), decode(data))
        assert module.has_more_frames(data[:end])


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_layers_are_no_pages(layers):
    plane = struct.pack(">hI", 0, 2 + 35)
    record = struct.pack(">4IH", 0, 0, 5, 7, 3) + 3 * plane + b"8BIMnorm" + bytes(8)
    content = struct.pack(">h", layers) + layers * record + layers * 3 * bytes(2 + 35)
    content = struct.pack(">I", len(content)) + content
    head = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 5, 7, 8, 3) + bytes(8)
    data = head + struct.pack(">I", len(content)) + content + bytes(2) + 105 * b"\xc8"
    assert Image.open(io.BytesIO(data)).n_frames == layers
    assert (decode(data) == 200).all()
    assert not module.has_more_frames(data)


END = b"\xff\xd9"  # of a JPEG


def cut(data):
    """A JPEG without its second half, but with its end."""
    return data[: len(data) // 2] + END


def with_hole(data):
    """A JPEG with zeros amid its scan."""
    middle = len(data) // 2
    return data[:middle] + bytes(400) + data[middle + 400 :]


@pytest.mark.parametrize("harm", [cut, with_hole])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_damaged_jpeg_is_refused(harm, mode, options):
    if module.decoder() == "Pillow":
        pytest.skip("Pillow decodes it without a word")
    data = file(made(200, 200, mode), **options)
    np.testing.assert_array_equal(decode(data), plain(data))
    with pytest.raises(InputError, match=r"^is damaged: [a-z0-9][\w ]+; replace it$"):
        decode(harm(data))


def test_a_damaged_jpeg_with_a_preview_is_refused():
    if module.decoder() == "Pillow":
        pytest.skip("Pillow decodes it without a word")
    data = file(made(200, 200), "MPO", save_all=True, append_images=[made(20, 20)])
    np.testing.assert_array_equal(decode(data), plain(data))
    end = data.index(END)
    with pytest.raises(InputError, match=r"^is damaged: .*; replace it$"):
        decode(data[: end // 2] + data[end:])


def test_oddities_of_a_whole_jpeg_are_harmless():
    data = file(made(61, 47))
    expected = decode(data)
    table = data.index(b"\xff\xdb")
    odd = {
        "bytes before a table": data[:table] + b"odd" + data[table:],
        "padding": data.removesuffix(END) + b"odd" + END,
        "more after the end": data + b"odd" * 100,
        "twice": data + data,
        "another JFIF version": data.replace(b"JFIF\0\1", b"JFIF\0\7", 1),
    }
    for name, changed in odd.items():
        assert changed != data
        np.testing.assert_array_equal(decode(changed), expected, err_msg=name)


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


BOXES = [(0, 0, 61, 47), (7, 3, 8, 47), (20, 30, 61, 31), (-9, -4, 40, 40), (30, 20, 70, 50)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("box", BOXES)
def test_a_box_is_pillows_crop(box, kind):
    data = file(made(61, 47), kind)
    cropped = np.asarray(plain(data).crop(box))
    np.testing.assert_array_equal(decode(data, box), cropped)
    np.testing.assert_array_equal(np.asarray(rgb(data, box)), cropped)
    pixels = Pixels.of(vars(PreprocessCfg(size=SIZE)))
    assert torch.equal(pixels.read(data, box), pixels.read(file(Image.fromarray(cropped), "PNG")))


def test_a_box_is_of_the_upright_image():
    exif = Image.Exif()
    exif[module.ORIENTATION] = 6  # to be turned by a quarter, clockwise
    data, box = file(made(61, 47), "PNG", exif=exif), (5, 20, 40, 60)
    turned = plain(data).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(decode(data, box), np.asarray(turned.crop(box)))


@pytest.mark.parametrize(
    "box", [(61, 0, 70, 47), (0, 47, 61, 60), (-20, -20, -1, -1), (40, 0, 90, 47), (0, 0, 640, 480)]
)
def test_a_box_of_another_image_is_refused(box):
    with pytest.raises(InputError, match=r"its box, .* is mostly outside of its 61 x 47 pixels"):
        decode(file(made(61, 47)), box)
