"""File bytes in, grey uint8 pixels out: JPEG, PNG, TIFF, BMP and WebP through OpenCV or Pillow, DICOM through pydicom.

Grey means luma (Rec. 601). A camera's orientation tag is obeyed, as viewers do. An alpha channel is ignored. 16-bit
values are divided by 257, or by 4095/255 where none exceeds 4095 (a 12-bit detector in a 16-bit file).
"""

import hashlib
import io

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps

VERSION = "v7"  # part of every cache key: raise it when a pixel or a fact comes out differently
FILM = 224  # px at which facts are told, as the source studies looked at films
MAX_PIXELS = 80_000_000  # five times the largest detector: a header that says more is a bomb, or no radiograph
_END = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_REDUCED = {1: cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
            4: cv2.IMREAD_REDUCED_GRAYSCALE_4}
_ROOM = 1.25  # at this many pixels for one, a reduced JPEG ends within a grey level of the full one, on average


def decode(content, *, size=None):
    """Return the grey pixels, uint8 `(height, width)`, of one image file.

    Args:
        content: the bytes of the file. Its header is checked before any memory is taken for pixels.
        size: if given, a JPEG may come back 2 or 4 times smaller, as long as both sides keep `1.25 * size`.

    Raises:
        ValueError: why this cannot be read, in words.
        ImportError: a DICOM file, and pydicom is not installed.
    """
    return _decode(content, size)[0]


def _decode(content, size):
    """Return what `decode` does, and the height and width in which the file holds it."""
    if not content:
        raise ValueError("empty file (zero bytes)")
    if content[128:132] == b"DICM":
        pixels = _dicom(content)
        return pixels, pixels.shape
    image = _open(content)
    complete = _END.get(image.format, b"never") in content[-64:]  # a few bytes may follow it
    if complete and image.mode in ("L", "RGB"):  # OpenCV is faster, but may fill up what is missing without a word
        reduction = _reduction(image, size)
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), _REDUCED[reduction])
        if pixels is not None:
            full = tuple(reduction * side for side in pixels.shape) if "exif" in image.info else image.size[::-1]
            height, width = (side // reduction for side in full)  # without a last row that the film fills only in part
            return pixels[:height, :width] if pixels.dtype == np.uint8 else _of_detector(pixels), full
    try:
        pixels = _pillow(image)
        return pixels, pixels.shape
    except MemoryError:  # the machine's fault, not the file's: no image is left out for it
        raise
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise ValueError(f"damaged or truncated {image.format}: {error}") from error


def _open(content):
    try:
        image = PIL.Image.open(io.BytesIO(content))
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"decompression bomb: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"not an image, or only the beginning of one: it starts with {content[:8]!r}") from error
    _check_pixels(image.width, image.height)
    return image


def _reduction(image, size):
    room = min(image.size) / (size * _ROOM) if size and image.format == "JPEG" else 1
    reduction = 4 if room >= 4 else 2 if room >= 2 else 1
    # A row that the film fills only in part would shift all others; where a tag may turn the film, it can lie anywhere.
    return 1 if "exif" in image.info and any(side % reduction for side in image.size) else reduction


def _check_pixels(width, height):
    if width * height > MAX_PIXELS:
        raise ValueError(f"decompression bomb: {width:,} x {height:,} pixels, where at most {MAX_PIXELS:,} are decoded")


def _pillow(image):
    white_is_zero = image.format == "TIFF" and image.tag_v2.get(262) == 0  # Pillow turns 8 bits by itself, not 16
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range, save as 8 or 16 bit")
    if image.mode.startswith("I"):
        grey = _of_detector(np.asarray(image))
        return 255 - grey if white_is_zero else grey
    image.info.pop("transparency", None)  # or Pillow warns about what is ignored on purpose
    return np.asarray(image.convert("L"))


def _of_detector(values):
    """Return the 8 bits of 16, of which perhaps 12 are used."""
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"grey levels from {values.min()} to {values.max()}, expected 16 bits: save as 8 or 16 bit")
    return _to_uint8(values.astype(np.float32), 0, 65535 if values.max() > 4095 else 4095)


def _to_uint8(values, low, high):
    if not np.isfinite([low, high]).all() or low == high or np.isnan(values).any():
        raise ValueError(f"grey levels from {low} to {high}, of which {np.isnan(values).sum()} are not numbers")
    return np.clip(np.rint((values - low) * (255 / (high - low))), 0, 255).astype(np.uint8)


def _dicom(content):
    try:
        import pydicom
    except ImportError as error:
        raise ImportError("DICOM files need pydicom: pip install pydicom pylibjpeg[all]") from error
    try:
        dataset = pydicom.dcmread(io.BytesIO(content))
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise ValueError(f"{dataset.NumberOfFrames} frames, expected one radiograph")
        _check_pixels(dataset.Columns, dataset.Rows)
        return _present(dataset, dataset.pixel_array)
    except MemoryError:
        raise
    except Exception as error:  # as above: whatever a damaged header leads to
        raise ValueError(f"unreadable DICOM: {error}") from error


def _present(dataset, stored):
    """Rescale, window and, for MONOCHROME1, invert; the full range of the result becomes 0 to 255.

    Source: DICOM PS3.3 C.11.1 and C.11.2.
    """
    from pydicom import pixels

    for name in ("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "VOILUTSequence", "VOILUTFunction",
                 "WindowCenter", "WindowWidth"):
        if name in dataset and dataset[name].value in (None, "", []):  # what may be absent may also stand there empty
            del dataset[name]
    kind = dataset.PhotometricInterpretation
    if stored.ndim != (3 if dataset.SamplesPerPixel == 3 else 2):  # more pixels than the header says
        raise ValueError(f"pixels of shape {stored.shape}, expected one radiograph")
    if dataset.SamplesPerPixel == 3:
        return _to_uint8(cv2.cvtColor(stored, cv2.COLOR_RGB2GRAY), 0, 2 ** int(dataset.BitsStored) - 1)
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"{kind} pixels, expected MONOCHROME1, MONOCHROME2 or RGB")
    half = 2 ** (int(dataset.BitsStored) - 1)
    ends = np.array([-half, half - 1]) if dataset.PixelRepresentation else np.array([0, 2 * half - 1])
    low, high = ends * float(dataset.get("RescaleSlope") or 1) + float(dataset.get("RescaleIntercept") or 0)
    values = pixels.apply_voi_lut(pixels.apply_modality_lut(stored, dataset), dataset)
    tables = [name for name in ("VOILUTSequence", "ModalityLUTSequence") if name in dataset]
    if tables:  # the last one applied says what its values can be
        low, high = 0, 2 ** int(dataset[tables[0]].value[0].LUTDescriptor[2]) - 1
    elif not ("WindowCenter" in dataset and "WindowWidth" in dataset):  # a window is turned by pydicom, if need be
        low, high = sorted((low, high))  # a negative slope has swapped the ends
    grey = _to_uint8(values, low, high)
    return 255 - grey if kind == "MONOCHROME1" else grey


def fit(image, size, *, letterbox=False):
    """Return `image` as uint8 `(size, size)`: squeezed as the source studies did, or letterboxed in black."""
    if not letterbox:
        return _resize(image, size, size)
    height, width = (max(1, round(side * size / max(image.shape))) for side in image.shape)
    top, left = (size - height) // 2, (size - width) // 2
    canvas = np.zeros((size, size), np.uint8)
    canvas[top:top + height, left:left + width] = _resize(image, width, height)
    return canvas


def _resize(image, width, height):
    image = _halved(image, 4 * width, 4 * height)
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _halved(image, width, height):
    """Return `image` halved as long as it is `width` x `height` or more; exact halves take a tenth of the time."""
    while image.shape[0] >= height and image.shape[1] >= width:
        even = image[:image.shape[0] & ~1, :image.shape[1] & ~1]
        image = cv2.resize(even, (even.shape[1] // 2, even.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return image


def facts(content):
    """Return what the audit wants to know of an image file, and the film at 224 px.

    A JPEG is looked at in a half or a quarter of its size where that keeps 448 px, and its film alone is hashed: two
    that are equal there are one, and decoding and hashing all of it would take twice as long. (From 284 px, films came
    out blurrier by a seventh of `blur`'s spread, from 485 px by none of it: a class of larger films must not look
    blurrier for being read so.)

    Returns:
        facts: dict of `pixel_sha256` (of shape and pixels, or film), `height` and `width` of the file, `mean_grey` in
            [0, 255], and `blur`: the negated mean gradient magnitude at 224 x 224 (grey levels a pixel; higher is
            blurrier).
        film: uint8 `(224, 224)`, squeezed.
    """
    image, (height, width) = _decode(content, 2 * FILM / _ROOM)
    film = _film(image)
    energy = _squared_steps(film, 1)
    energy += _squared_steps(film, 0)
    digest = hashlib.sha256(b"%d x %d:" % (height, width))
    digest.update(np.ascontiguousarray(image if image.shape == (height, width) else film))
    return {"pixel_sha256": digest.hexdigest(), "height": height, "width": width, "mean_grey": cv2.mean(image)[0],
            "blur": -cv2.mean(np.sqrt(energy, out=energy))[0]}, film


def _squared_steps(film, axis):
    """Return the square of `np.gradient` along one axis, in a fraction of its time."""
    step = cv2.Sobel(film, cv2.CV_32F, axis, 1 - axis, ksize=1, scale=0.5, borderType=cv2.BORDER_REPLICATE)
    step[(slice(None),) * axis + (slice(None, None, FILM - 1),)] *= 2  # at an edge, the one step that is known
    step *= step
    return step


def _film(image):
    """Return what `fit` does at 224 px, of large images by way of 448 px, in a quarter of the time.

    The difference is 0.2 grey levels on average, and a fiftieth of `blur`'s spread; a tenth for grainy films just below
    896 px.
    """
    image = _halved(image, 4 * FILM, 4 * FILM)
    if min(image.shape) >= 2 * FILM:
        image = cv2.resize(image, (2 * FILM, 2 * FILM), interpolation=cv2.INTER_LINEAR)
    return fit(image, FILM)


def blurred(image, share):
    """Return one image blurred by a Gaussian of `share` of its side, so that a family of blurs is one at any size."""
    return cv2.GaussianBlur(image, (0, 0), share * image.shape[0])
