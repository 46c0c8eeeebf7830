"""File bytes in, grey uint8 pixels out: JPEG, PNG, TIFF, BMP, WebP through OpenCV or Pillow, and DICOM.

Grey means luma (Rec. 601). The orientation tag of a camera is obeyed, as viewers do. An alpha channel is ignored. 16-bit
values are divided by 257, or by 4095/255 where none exceeds 4095 (a 12-bit detector in a 16-bit file).
"""

import hashlib
import io

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps

VERSION = "v1"  # part of every cache key: raise it when a pixel or a fact comes out differently
MAX_PIXELS = 80_000_000  # five times the largest detector: a header that says more is a bomb, or not a radiograph
_END = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_REDUCED = {8: cv2.IMREAD_REDUCED_GRAYSCALE_8, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2}


def decode(content, *, size=None):
    """Return the grey pixels, uint8 `(height, width)`, of one image file.

    Args:
        content: the file's bytes. The header is checked before any pixel memory is taken.
        size: if given, a JPEG may come back 2, 4 or 8 times smaller, as long as both sides keep at least `2 * size`.

    Raises:
        ValueError: the reason why this cannot be read, in words.
        ImportError: a DICOM file, and pydicom or the decoder of its compression is not installed.
    """
    if not content:
        raise ValueError("empty file (zero bytes)")
    if content[128:132] == b"DICM":
        return _dicom(content)
    try:
        image = PIL.Image.open(io.BytesIO(content))
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"decompression bomb: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"not an image: the file starts with {content[:8]!r}") from error
    _check_pixels(image.width, image.height)
    complete = content[-64:].rstrip(b"\0\r\n").endswith(_END.get(image.format, b"never"))
    if complete and image.mode in ("L", "RGB"):  # OpenCV is the faster one, but it pads what is missing without a word
        factor = next((f for f in _REDUCED if size and min(image.size) >= 2 * size * f), 1) if image.format == "JPEG" else 1
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), _REDUCED.get(factor, cv2.IMREAD_GRAYSCALE))
        if pixels is not None:
            return pixels
    try:
        return _pillow(image)
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise ValueError(f"damaged or truncated {image.format}: {error}") from error


def _check_pixels(width, height):
    if width * height > MAX_PIXELS:
        raise ValueError(f"decompression bomb: {width} x {height} pixels; at most {MAX_PIXELS:,} are decoded")


def _pillow(image):
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save as 8 or 16 bit")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        return np.clip(np.rint(values * (255 / (65535 if values.max() > 4095 else 4095))), 0, 255).astype(np.uint8)
    image.info.pop("transparency", None)
    return np.asarray(image.convert("L"))


def _dicom(content):
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise ImportError("DICOM files need pydicom: pip install pydicom pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg") from error
    try:
        dataset = pydicom.dcmread(io.BytesIO(content))
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            raise ValueError(f"{dataset.NumberOfFrames} frames; expected a single radiograph")
        _check_pixels(dataset.Columns, dataset.Rows)
        stored = dataset.pixel_array
        return _present(dataset, stored, pydicom.pixels)
    except ImportError:
        raise
    except Exception as error:  # as above: whatever a damaged header leads to
        raise ValueError(f"unreadable DICOM: {error}") from error


def _present(dataset, stored, pixels):
    """Rescale, window and, for MONOCHROME1, invert; the full range of the result becomes 0 to 255."""
    if dataset.SamplesPerPixel == 3:
        return cv2.cvtColor(pixels.convert_color_space(stored, dataset.PhotometricInterpretation, "RGB").astype(np.uint8), cv2.COLOR_RGB2GRAY)
    bits = int(dataset.BitsStored)
    ends = np.array([0, 2**bits - 1] if dataset.PixelRepresentation == 0 else [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1])
    slope, intercept = float(dataset.get("RescaleSlope", 1) or 1), float(dataset.get("RescaleIntercept", 0) or 0)
    low, high = ends * slope + intercept
    values = pixels.apply_voi_lut(pixels.apply_modality_lut(stored, dataset), dataset)
    if "VOILUTSequence" in dataset:
        low, high = 0, 2 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1
    grey = np.clip(np.rint((values - low) * (255 / (high - low))), 0, 255).astype(np.uint8)
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def fit(image, size, *, letterbox=False):
    """Return `image` as `(size, size)`: squeezed as the source studies did, or letterboxed in black with its aspect kept."""
    height, width = image.shape
    if letterbox:
        scale = size / max(height, width)
        inner = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
        canvas = np.zeros((size, size), np.uint8)
        canvas[top:top + inner[1], left:left + inner[0]] = _resize(image, inner)
        return canvas
    return _resize(image, (size, size))


def _resize(image, shape):
    shrinks = image.shape[1] >= shape[0] and image.shape[0] >= shape[1]
    return cv2.resize(image, shape, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def facts(image):
    """Return what the audit wants to know of the full-size pixels.

    Returns:
        dict: `pixel_sha256` (shape and pixels), `height`, `width`, `mean_grey` in [0, 255], and `blur`, the negated mean
        gradient magnitude of the image squeezed to 224 × 224 (grey levels a pixel; higher = blurrier).
    """
    height, width = image.shape
    down, across = np.gradient(fit(image, 224).astype(np.float32))
    return {
        "pixel_sha256": hashlib.sha256(b"%d x %d:" % (height, width) + image.tobytes()).hexdigest(),
        "height": height, "width": width, "mean_grey": float(image.mean()), "blur": -float(np.hypot(down, across).mean()),
    }
