"""Pictures into the arrays that a model was trained on."""

from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from quantkit.data.casting import kind
from quantkit.data.inputs import Array, InputSpec
from quantkit.data.preprocessing import ImagePreprocessing, Layout
from quantkit.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class ImageTransform:
    """An `ImagePreprocessing` settled for one model input.

    Raises:
        DataError: the input does not take pictures, or the preprocessing does not fit it.
    """

    def __init__(self, image: ImagePreprocessing, spec: InputSpec) -> None:
        self.spec = spec
        self.layout = _layout(image, spec)
        c, h, w = (1, 2, 3) if self.layout == "NCHW" else (3, 1, 2)
        self.channels = _channels(image, spec, spec.shape[c])
        self.size = _size(image, spec, spec.shape[h], spec.shape[w])
        self._crop_pct = image.crop_pct
        self._table = _table(image, spec, self.channels)

    def read(self, path: Path) -> Array:
        """Return the picture at `path` as this input wants it, with a batch axis of 1.

        RGB or grey by the model's channels; transparency is dropped, 16 bits are scaled to 8, of an animation
        the first frame is taken, and EXIF orientation is not applied (as in torchvision).

        Raises:
            DataError: the file is no picture, or damaged.
        """
        from PIL import Image  # here, so that importing quantkit does not import Pillow

        try:
            with Image.open(path) as picture:
                return self._finish(self._fit(_convert(picture, self.channels)))
        except Exception as error:  # Pillow's decoders raise whatever their damage leads to
            raise DataError(
                f"{path}: this picture cannot be decoded ({' '.join(str(error).split())}); "
                "replace it or take it out of the folder."
            ) from error

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether `shape` is a picture (H, W, C) or (C, H, W), or several along a leading axis."""
        return len(shape) in (3, 4) and 0 not in shape[-3:] and self.channels in (shape[-1], shape[-3])

    def apply(self, pixels: Array) -> Array:
        """Return uint8 `pixels`, (H, W, C) or (C, H, W), as this input wants them, with a batch axis of 1."""
        from PIL import Image

        first, last = pixels.shape[0] == self.channels, pixels.shape[-1] == self.channels
        if first and not (last and self.layout == "NHWC"):
            pixels = np.moveaxis(pixels, 0, -1)
        pixels = np.ascontiguousarray(pixels)
        if self.size is not None and pixels.shape[:2] != self.size:
            picture = Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels)
            return self._finish(self._fit(picture))
        return self._finish(pixels)

    def _fit(self, picture: "Image.Image") -> Array:
        from PIL import Image

        width, height = picture.size
        if self.size is not None and (height, width) != self.size:
            box_height, box_width = self.size
            if self._crop_pct is None:
                picture = picture.resize((box_width, box_height), Image.Resampling.BILINEAR)
            else:
                cover_height, cover_width = (
                    round(box_height / self._crop_pct),
                    round(box_width / self._crop_pct),
                )
                if cover_height * width >= cover_width * height:
                    height, width = cover_height, cover_height * width // height
                else:
                    height, width = cover_width * height // width, cover_width
                top, left = round((height - box_height) / 2), round((width - box_width) / 2)
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
                picture = picture.crop((left, top, left + box_width, top + box_height))
        pixels = np.asarray(picture)
        return pixels[..., None] if pixels.ndim == 2 else pixels

    def _finish(self, pixels: Array) -> Array:
        """(H, W, C) uint8 → (1, C, H, W) or (1, H, W, C) of the input's type, by table."""
        shape = pixels.shape if self.layout == "NHWC" else (self.channels, *pixels.shape[:2])
        result = np.empty((1, *shape), self.spec.dtype)
        for c in range(self.channels):
            plane = result[0, ..., c] if self.layout == "NHWC" else result[0, c]
            plane[...] = pixels[..., c] if self._table is None else self._table[c][pixels[..., c]]
        return result


def _convert(picture: "Image.Image", channels: int) -> "Image.Image":
    from PIL import Image

    if picture.mode.startswith("I"):
        grey = np.asarray(picture)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("its pixels are not within 0…65535")
        grey8 = ((grey.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)
        picture = Image.fromarray(grey8)
    elif picture.mode == "F":
        raise ValueError("its pixels are floats of unknown range; store it as .npy")
    elif picture.mode == "P":
        picture = picture.convert(
            "RGBA"
        )  # a palette may hold transparency, which only RGBA takes without complaint
    return picture if picture.mode == _MODES[channels] else picture.convert(_MODES[channels])


def _layout(image: ImagePreprocessing, spec: InputSpec) -> Layout:
    if len(spec.shape) != 4:
        raise DataError(
            f"{spec}: pictures need an input of rank 4; store this model's inputs as .npy or .npz."
        )
    if image.layout is not None:
        return image.layout
    axes = {"NCHW": spec.shape[1], "NHWC": spec.shape[3]}
    # 4 channels are so rare that a length of 4 beside one of 1 or 3 is no channel axis.
    found = [name for name, dim in axes.items() if dim in (1, 3)] or [
        n for n, dim in axes.items() if dim == 4
    ]
    if len(found) != 1:
        raise DataError(
            f"{spec}: {'both layouts fit' if found else 'no axis has 1, 3 or 4 channels'}; "
            "give --layout NCHW or NHWC."
        )
    return cast(Layout, found[0])


def _channels(image: ImagePreprocessing, spec: InputSpec, dim: int | str | None) -> int:
    values = max(len(image.mean), len(image.std))
    channels = dim if isinstance(dim, int) else (values if values > 1 else 3)
    if channels not in _MODES:
        raise DataError(
            f"{spec}: {channels} channels are no picture's (1, 3 or 4); check --layout, or store .npy."
        )
    for name, given in (("mean", image.mean), ("std", image.std)):
        if len(given) not in (1, channels):
            raise DataError(
                f"{spec}: {len(given)} values of --{name} for {channels} channels; give 1 or {channels}."
            )
    return channels


def _size(
    image: ImagePreprocessing, spec: InputSpec, height: int | str | None, width: int | str | None
) -> tuple[int, int] | None:
    if image.size is None:
        if isinstance(height, int) and isinstance(width, int):
            return height, width
        if image.crop_pct is None and not isinstance(height, int) and not isinstance(width, int):
            return None
        default = 224
        if image.crop_pct is None:
            raise DataError(f"{spec}: one of height and width is free; give --size HEIGHT WIDTH.")
        return (
            height if isinstance(height, int) else default,
            width if isinstance(width, int) else default,
        )
    for wanted, dim in zip(image.size, (height, width), strict=True):
        if isinstance(dim, int) and dim != wanted:
            raise DataError(f"{spec}: size {image.size} is not the model's; leave --size out.")
    return image.size


def _table(image: ImagePreprocessing, spec: InputSpec, channels: int) -> Array | None:
    if kind(spec.dtype) != "float":
        if spec.dtype != np.uint8 or (image.mean, image.std) != ((0.0,), (1.0,)):
            raise DataError(
                f"{spec}: an integer input takes pixels as they are, as uint8; leave --mean and --std "
                "out, or store this model's inputs as .npy."
            )
        return None
    # float64, then rounded once: the same table whatever the input's type.
    pixels = np.arange(256) / 255
    mean = np.broadcast_to(np.array(image.mean), channels)[:, None]
    std = np.broadcast_to(np.array(image.std), channels)[:, None]
    with np.errstate(over="ignore"):
        table = ((pixels - mean) / std).astype(spec.dtype)
    if not bool(np.isfinite(table).all()):
        raise DataError(
            f"{spec}: with --std {image.std} pixels overflow {spec.dtype.name}; give a larger --std."
        )
    return np.asarray(table)
