"""An untrusted image file as RGB pixels: any format that Pillow decodes, or an error that names the file.

In: a path, or the bytes of a file. Out: an upright RGB image, with white behind transparent pixels. vLLM,
qwen-vl-utils and transformers show images to a model in the same way.
"""

import io
import os
import stat
import struct
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffTags
from PIL.TiffImagePlugin import TiffImageFile

from auto_quantize_model.files import InputError, shown

# Pillow opens these formats but does not decode them: EPS starts Ghostscript, the others need another library.
NOT_DECODED = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
# Later frames of these formats are not later moments: an MPO keeps other views or a gain map, a PSD its layers.
ONE_PICTURE = {"MPO", "PSD"}
WITH_ALPHA = {"RGBA": None, "LA": None, "PA": None, "RGBa": "RGBA", "La": "LA"}  # the last two are premultiplied
ROWS = 256  # rows of an image with transparency that are put over white at a time
GREY_16 = {"I;16", "I;16B", "I;16L", "I;16N"}
# The formats whose 16-bit grey goes from 0 (black) to 65535 (white). FITS and MCIDAS hold measured values instead.
GREY_16_FORMATS = {"PNG", "TIFF", "JPEG2000"}
TIFF_TAGS = {name: tag for tag, name in TiffTags.TAGS.items() if isinstance(name, str)}
# What Pillow raises on a damaged file, by its documentation and by a test with flipped bytes in files of each format.
PILLOW_ERRORS = (
    OSError,  # also UnidentifiedImageError
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    SyntaxError,
    MemoryError,
    RuntimeError,  # also NotImplementedError and RecursionError
    BufferError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

Image.init()
FORMATS = sorted(set(Image.OPEN) - NOT_DECODED)
# Pillow opens an MPO with its JPEG reader.
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in {*FORMATS, "MPO"}}


@dataclass(frozen=True)
class Picture:
    """An upright RGB image, and whether its file has later frames or pages, which are left out."""

    image: Image.Image
    more_frames: bool


def images_in(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """The image files in a folder and its subfolders, by name, and the number of skipped entries of each other sort.

    Raises:
        InputError: one of the folders cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"{folder}: a folder in it cannot be read ({error}); give this user access, or move it away")

    images, skipped = [], Counter[str]()
    for place, folders, names in os.walk(folder, onerror=refuse):
        hidden = [name for name in folders if name.startswith(".")]
        linked = [name for name in folders if name not in hidden and Path(place, name).is_symlink()]
        skipped += Counter({"hidden folders": len(hidden), "links to folders": len(linked)})
        folders[:] = [name for name in folders if name not in hidden]
        for name in names:
            file = Path(place, name)
            if name.startswith("."):
                skipped["hidden"] += 1
            elif file.suffix.lower() in SUFFIXES:
                images.append(file)
            else:
                skipped[shown(Path(file.suffix.lower())) if file.suffix else "without a suffix"] += 1
    return sorted(images), dict(sorted(skipped.items()))


def open_picture(source: Path | bytes, where: str) -> Picture:
    """Decode an image file.

    Args:
        source: the file's path, or its bytes.
        where: the name of the image in errors.

    Raises:
        InputError: the file is missing, not a regular file, damaged or too large, or its pixels have no known range.
    """
    if isinstance(source, Path):
        _require_regular(source, where)
    try:
        with warnings.catch_warnings():
            # Pillow checks the size in the header, before it decodes a pixel. A mere warning would not save the memory.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as opened:
                upright = _upright(_rgb(opened, where), opened)
                return Picture(upright, opened.format not in ONE_PICTURE and getattr(opened, "is_animated", False))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{where} has too many pixels ({error}); save a smaller copy, as the model gets a reduced image anyway"
        ) from None
    except PILLOW_ERRORS as error:
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise InputError(f"{where} cannot be read ({text}); replace it or remove the sample") from None


def _require_regular(path: Path, where: str) -> None:
    """Refuse a path that is not a regular file, before it is opened: opening a FIFO waits forever."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise InputError(f"{where} does not exist; correct the path or remove the sample") from None
    except (OSError, ValueError) as error:  # a loop of links, no permission, a name too long, a NUL in the name
        raise InputError(f"{where} cannot be read ({error}); correct the path or remove the sample") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{where} is not a regular file; give the path of an image file")


def _rgb(opened: Image.Image, where: str) -> Image.Image:
    """The pixels as RGB, with white behind transparent ones.

    Raises:
        InputError: the pixels are 32-bit numbers, whose black and white are unknown, or the file lacks some pixels.
    """
    rawmode = _rawmode(opened)
    _require_all_strips(opened, where)
    opened.load()
    grey_16 = opened.mode in GREY_16 and opened.format in GREY_16_FORMATS
    if opened.mode in {"I", "F", *GREY_16} and not grey_16:
        kind = {"I": "32-bit integers", "F": "32-bit floats"}.get(opened.mode, "16-bit integers")
        raise InputError(
            f"{where} has pixels of {kind} (mode {opened.mode}), whose black and white are unknown; save it as an 8-bit"
            " image"
        )
    if grey_16:
        return Image.fromarray(_grey_8(opened)).convert("RGB")
    transparent = opened.info.get("transparency")
    if opened.mode not in WITH_ALPHA and transparent is None:
        return opened.convert("RGB")
    if rawmode == "RGB;16B" and transparent is not None:
        raise InputError(
            f"{where} names a transparent colour of 16 bits, and Pillow keeps 8; save it with an alpha channel instead"
        )
    if (
        rawmode in ("L;2", "L;4") and transparent is not None
    ):  # Pillow spreads the grey levels over 0 to 255, but not the transparent one
        opened.info["transparency"] = transparent * (85 if rawmode == "L;2" else 17)
    return _over_white(opened)


def _require_all_strips(opened: Image.Image, where: str) -> None:
    """Refuse a TIFF whose strips end before the image does: Pillow would leave the rest black."""
    boxes = [tile.extents for tile in opened.tile if tile.extents] if isinstance(opened, TiffImageFile) else []
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    if boxes and covered < opened.width * opened.height:
        raise InputError(f"{where} cannot be read (its strips end before the image); replace it or remove the sample")


def _over_white(opened: Image.Image) -> Image.Image:
    """Transparent pixels over white, as RGB, a band of rows at a time, because a copy of a large image takes memory."""
    result = Image.new("RGB", opened.size)
    for top in range(0, opened.height, ROWS):
        box = 0, top, opened.width, min(top + ROWS, opened.height)
        band = opened.crop(box)
        straight = band.convert(WITH_ALPHA.get(opened.mode) or opened.mode).convert("RGBA")
        white = Image.new("RGBA", straight.size, (255, 255, 255, 255))
        result.paste(Image.alpha_composite(white, straight).convert("RGB"), box)
    return result


def _rawmode(opened: Image.Image) -> str:
    """How the file stores its pixels, such as `L;4`. Pillow forgets this once the pixels are loaded."""
    tile = getattr(opened, "tile", None)
    arguments = tile[0].args if tile else None
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _grey_8(opened: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """16-bit grey as uint8 (height, width): the high byte, as Pillow itself reads 16-bit colour."""
    tags = getattr(opened, "tag_v2", {})
    bits = tags.get(TIFF_TAGS["BitsPerSample"], (16,))[0]
    values = np.asarray(opened)
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(TIFF_TAGS["PhotometricInterpretation"]) == 0:  # white is zero
        grey = 255 - grey
    transparent = opened.info.get("transparency")
    return grey if transparent is None else np.where(values == transparent, np.uint8(255), grey)


def _upright(image: Image.Image, opened: Image.Image) -> Image.Image:
    """The image turned as EXIF says, because a phone stores a photo in the orientation of its sensor.

    Only the orientation is kept. `exif_transpose` writes the other tags again, and fails where one is malformed.
    """
    orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation == 1:
        return image
    image.info.clear()
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(image)
