"""Images of strangers: the right pixels for every kind of image, and an error with a name for every damaged one."""

import io
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from auto_quantize_model.data.images import SUFFIXES, open_picture
from auto_quantize_model.files import InputError

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def stored(image: Image.Image, name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> list[Any]:
    """The first row of an image as it is opened."""
    return [tuple(pixel) for pixel in np.asarray(open_picture(data, "it").image)[0].tolist()]


def test_a_tiff_whose_strips_end_before_the_image_is_refused() -> None:
    data = stored(Image.new("RGB", (4, 2), RED), "TIFF")
    height = struct.pack("<HHI", 257, 4, 1)  # ImageLength, one LONG
    if height not in data:
        height = struct.pack("<HHI", 257, 3, 1)  # or one SHORT
    at = data.index(height) + len(height)
    assert struct.unpack_from("<H", data, at) == (2,)
    assert pixels(data) == [RED] * 4
    with pytest.raises(InputError, match="it cannot be read .its strips end before the image"):
        open_picture(data[:at] + struct.pack("<H", 600) + data[at + 2 :], "it")


def png(depth: int, colour: int, row: bytes, width: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row, written by hand: Pillow writes neither all depths nor every transparent colour."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    written = b"\x89PNG\r\n\x1a\n"
    for name, data in parts:
        written += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return written


def test_transparent_pixels_are_white() -> None:
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(0, 0, 0, 0), (255, 0, 0, 255), (255, 0, 0, 51)])  # the last is a fifth red, four fifths white
    for name in ("PNG", "TIFF", "WEBP"):
        lossless = {"lossless": True, "exact": True} if name == "WEBP" else {}
        assert pixels(stored(rgba, name, **lossless)) == [WHITE, RED, (255, 204, 204)]
    grey = Image.new("LA", (3, 1))
    grey.putdata([(0, 0), (100, 255), (0, 51)])
    assert pixels(stored(grey, "PNG")) == [WHITE, (100,) * 3, (204,) * 3]


def test_a_transparent_colour_and_transparent_palette_entries_are_white() -> None:
    rgb = Image.new("RGB", (2, 1))
    rgb.putdata([RED, GREEN])
    assert pixels(stored(rgb, "PNG", transparency=GREEN)) == [RED, WHITE]
    grey = Image.new("L", (2, 1))
    grey.putdata([7, 8])
    assert pixels(stored(grey, "PNG", transparency=7)) == [WHITE, (8,) * 3]
    palette = Image.new("P", (3, 1))
    palette.putpalette([*RED, *GREEN, 0, 0, 0])
    palette.putdata([0, 1, 2])
    assert pixels(stored(palette, "PNG", transparency=1)) == [RED, WHITE, (0, 0, 0)]
    assert pixels(stored(palette, "PNG", transparency=bytes([255, 0, 51]))) == [RED, WHITE, (204, 204, 204)]
    assert pixels(stored(palette, "GIF", transparency=2)) == [RED, GREEN, WHITE]


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "expected"),
    [
        (1, b"\x40", 1, [(0, 0, 0), WHITE]),
        (2, b"\x60", 1, [WHITE, (170,) * 3]),
        (4, b"\x39", 3, [WHITE, (153,) * 3]),
        (8, b"\x39\x40", 0x39, [WHITE, (64,) * 3]),
        (16, b"\x39\x01\x39\x02", 0x3901, [WHITE, (0x39,) * 3]),
    ],
)
def test_a_transparent_grey_of_any_depth_is_white(depth: int, row: bytes, transparent: int, expected: Any) -> None:
    assert pixels(png(depth, 0, row, 2, (b"tRNS", struct.pack(">H", transparent)))) == expected


def test_a_transparent_colour_of_16_bits_is_refused() -> None:
    data = png(16, 2, bytes(6), 1, (b"tRNS", bytes(6)))
    with pytest.raises(InputError, match="it names a transparent colour of 16 bits"):
        open_picture(data, "it")
    assert pixels(png(16, 2, b"\x80\xff\x01\x00\x00\xff", 1)) == [(0x80, 1, 0)]


MODES = {
    "PNG": ("RGBA", "LA", "P", "L", "1", "RGB"),
    "TIFF": ("RGBA", "LA", "P", "PA", "L", "1", "RGB", "CMYK", "YCbCr"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGBA", "RGB"),
    "GIF": ("RGBA", "P", "L"),
    "BMP": ("RGBA", "P", "L", "1", "RGB"),
    "JPEG2000": ("RGBA", "LA", "L", "RGB"),
    "AVIF": ("RGBA", "RGB"),
}


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, modes in MODES.items() for mode in modes])
def test_the_pixels_are_those_of_transformers_own_conversion(name: str, mode: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 8, 4), dtype=np.uint8))
    image = noise.convert(mode) if mode in ("RGBA", "LA") else noise.convert("RGB").convert(mode)
    data = stored(image, name)
    with Image.open(io.BytesIO(data)) as opened:
        expected = convert_to_rgb(opened, return_numpy=True)
    assert np.array_equal(np.asarray(open_picture(data, "it").image), expected)


def test_colours_of_other_models_are_converted() -> None:
    assert pixels(stored(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")) == [RED]
    assert pixels(stored(Image.new("1", (1, 1), 1), "PNG")) == [WHITE]
    (lab,) = pixels(stored(Image.new("LAB", (1, 1), (255, 128, 128)), "TIFF"))
    assert min(lab) >= 250  # the brightest of CIELAB is white


def test_16_bit_grey_keeps_its_high_byte() -> None:
    """As Pillow reads 16-bit colour; a plain conversion makes all above 255 white."""
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    expected = [(value,) * 3 for value in (0, 0, 1, 0x80, 0xFF)]
    big = Image.frombytes("I;16B", (5, 1), values.astype(">u2").tobytes())
    for data in (*(stored(Image.fromarray(values), name) for name in ("PNG", "TIFF", "JPEG2000")), stored(big, "TIFF")):
        assert pixels(data) == expected
    inverted = bytearray(stored(Image.fromarray(values), "TIFF"))
    at = inverted.index(struct.pack("<HHI", 262, 3, 1))  # PhotometricInterpretation
    inverted[at + 8] = 0  # white is zero
    assert pixels(bytes(inverted)) == [(255 - value[0],) * 3 for value in expected]


@pytest.mark.parametrize(
    ("mode", "kind"), [("I", "32-bit integers"), ("F", "32-bit floats"), ("I;16", "16-bit integers")]
)
def test_numbers_without_black_and_white_are_refused(mode: str, kind: str) -> None:
    name = "IM" if mode == "I;16" else "TIFF"  # a format that says nothing of the range
    with pytest.raises(InputError, match=rf"it has pixels of {kind} \(mode .*\), whose black and white are unknown"):
        open_picture(stored(Image.new(mode, (2, 2)), name), "it")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_image_is_turned_as_exif_says(name: str, orientation: int) -> None:
    """Each orientation brings its own corner of the stored image to the upper left."""
    image = Image.new("RGB", (64, 32))
    corner = {1: (0, 0), 2: (48, 0), 3: (48, 16), 4: (0, 16), 5: (0, 0), 6: (0, 16), 7: (48, 16), 8: (48, 0)}
    x, y = corner[orientation]
    image.paste(RED, (x, y, x + 16, y + 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = open_picture(stored(image, name, exif=exif), "it").image
    assert found.size == ((64, 32) if orientation < 5 else (32, 64))
    red, _, _ = found.split()
    assert np.asarray(red)[:12, :12].min() > 200 and np.asarray(red)[20:, 20:].max() < 60


def test_text_in_a_rational_exif_tag_leaves_the_orientation_right() -> None:
    """Pillow reads such a tag, and raises a TypeError where the tags are written again."""
    entries = struct.pack("<HHHI4s", 2, 0x0112, 3, 1, b"\6\0\0\0") + struct.pack("<HHI4s", 0x011A, 2, 4, b"72\0\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4)
    assert open_picture(stored(Image.new("RGB", (64, 32)), "JPEG", exif=exif), "it").image.size == (32, 64)


def test_the_first_frame_of_an_animation_is_used_and_told() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN)]
    for name in ("GIF", "PNG", "TIFF", "WEBP"):
        lossless = {"lossless": True} if name == "WEBP" else {}
        picture = open_picture(stored(frames[0], name, save_all=True, append_images=frames[1:], **lossless), "it")
        assert picture.image.getpixel((0, 0)) == RED and picture.more_frames
        assert not open_picture(stored(frames[0], name), "it").more_frames
    # The second picture of a phone's MPO is not a later frame.
    assert not open_picture(stored(frames[0], "MPO", save_all=True, append_images=frames[1:]), "it").more_frames


def test_an_image_of_144_megapixels_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Any) -> None:
        raise AssertionError("decoded")

    header = struct.pack(">IIBBBBB", 12000, 12000, 8, 0, 0, 0, 0)
    data = bytearray(png(8, 0, b"\0", 1))
    data[16:29] = header
    data[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(InputError, match=r"it has too many pixels \(Image size \(144000000 pixels\)"):
        open_picture(bytes(data), "it")


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket.png"))
    expected = {
        "fifo.png": "is not a regular file",
        "folder.png": "is not a regular file",
        "socket.png": "is not a regular file",
        "loop.png": "cannot be read .*symbolic links",
        "broken.png": "does not exist",
        "x" * 300 + ".png": "cannot be read .*too long",
        "nul\0.png": "cannot be read .*null",
        "half\ud800.png": "cannot be read .*surrogates",
    }
    for name, message in expected.items():
        with pytest.raises(InputError, match=f"it {message}"):
            open_picture(tmp_path / name, "it")
    with pytest.raises(InputError, match="it is not a regular file"):
        open_picture(Path("/dev/zero"), "it")
    listening.close()


@pytest.mark.parametrize("data", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_named(data: bytes) -> None:
    with pytest.raises(InputError, match="it cannot be read .*replace it or remove the sample"):
        open_picture(data, "it")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of tags that it passes over
def test_damaged_images_are_opened_or_named() -> None:
    """Flipped, cut and overwritten bytes in files of six formats: never another exception than an InputError."""
    generator = np.random.default_rng(0)
    noise = Image.fromarray(generator.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, (72, 1)
    tagged = {"JPEG", "PNG", "WEBP", "TIFF"}
    sound = [
        stored(noise.convert(mode), name, **({"exif": exif} if name in tagged else {}))
        for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
        for mode in ("RGB", "L", "P")
        if (name, mode) != ("JPEG", "P")
    ]
    refused = 0
    for _ in range(600):
        data = bytearray(sound[generator.integers(len(sound))])
        for _ in range(generator.integers(1, 6)):
            at = generator.integers(len(data) if generator.random() < 0.4 else min(len(data), 160))
            data[at] = generator.choice([generator.integers(256), 0, 255, data[at] ^ 1])
        if generator.random() < 0.1:
            del data[generator.integers(len(data)) :]
        try:
            open_picture(bytes(data), "it")
        except InputError as error:
            assert str(error).startswith("it ")
            refused += 1
    assert 100 < refused < 600


def test_the_suffixes_are_those_that_pillow_decodes() -> None:
    assert {".gif", ".tif", ".tiff", ".avif", ".jfif", ".jpg", ".png", ".webp", ".bmp", ".mpo"} <= SUFFIXES
    assert not {".eps", ".ps", ".pdf", ".h5", ".mpg", ".heic", ".txt"} & SUFFIXES
