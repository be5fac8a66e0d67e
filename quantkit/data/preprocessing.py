"""What a user says about pictures: how their pixels become a model's input."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from quantkit.errors import DataError, UnknownNameError

Layout = Literal["NCHW", "NHWC"]

PRESETS: dict[str, dict[str, Any]] = {
    # torchvision's evaluation transform: short side to 256, the middle 224 of it, bilinear.
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.875},
    "0-1": {},
}


@dataclass(frozen=True, kw_only=True)
class ImagePreprocessing:
    """How pixels become a model's input: (pixel / 255 − mean) / std, after scaling to size.

    Attributes:
        mean: of pixels scaled to 0…1; one value, or one per channel.
        std: likewise.
        size: (height, width); None: the model's own where they are static, else those of each picture (with
            `crop_pct`: 224 by 224).
        layout: None: found from the model's input, by the axis that has 1, 3 or 4 channels.
        crop_pct: None: a picture is scaled to `size` whatever its proportions. Else it is scaled, keeping
            them, to cover size / crop_pct, and the middle is cut out. A picture that has `size` already is
            taken as it is.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None
    layout: Layout | None = None
    crop_pct: float | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(float(v) for v in np.atleast_1d(getattr(self, name))))
        if not self.mean or not all(0 <= m <= 1 for m in self.mean):
            raise DataError(
                f"image preprocessing: mean {self.mean} is not within 0…1; pixels are scaled to 0…1, so "
                "divide a mean of 0…255 by 255."
            )
        if not self.std or not all(0 < s < 1e6 for s in self.std):
            raise DataError(
                f"image preprocessing: std {self.std} is not above 0; give one value or one per channel."
            )
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise DataError(
                f"image preprocessing: size {self.size} is not (height, width); give two numbers ≥ 1."
            )
        if self.layout not in (None, "NCHW", "NHWC"):
            raise DataError(f"image preprocessing: layout {self.layout!r} is unknown; choose NCHW or NHWC.")
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise DataError(
                f"image preprocessing: crop_pct {self.crop_pct} is not within 0…1; 0.875 is usual."
            )

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return the preset "imagenet" or "0-1".

        Raises:
            UnknownNameError: there is no such preset.
        """
        if name not in PRESETS:
            raise UnknownNameError(
                f"image preset {name}: no such preset; choose one of {', '.join(PRESETS)}."
            )
        return cls(**PRESETS[name])

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON holds them; `from_json` is the inverse."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "size": None if self.size is None else list(self.size),
            "layout": self.layout,
            "crop_pct": self.crop_pct,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the preprocessing that `to_json` described."""
        size = fields["size"]
        return cls(
            mean=tuple(fields["mean"]),
            std=tuple(fields["std"]),
            size=None if size is None else (int(size[0]), int(size[1])),
            layout=fields["layout"],
            crop_pct=fields["crop_pct"],
        )
