"""What `--method` names: parts joined by "+", each of another kind, carried out in one order whatever theirs is.

equalize → smoothquant or awq → rounding of weights → ranges of activations → bias
--method awq+gptq      --method smoothquant+percentile      --method equalize+gptq+bias
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from quantkit.calibrators.base import list_calibrators
from quantkit.calibrators.weight_rounding import Rounding
from quantkit.errors import UnknownNameError

Scaling = Literal["smoothquant", "awq"]
Kind = Literal["equalize", "scaling", "rounding", "ranges", "bias"]

# In words, for errors; in the order in which they are carried out.
_KINDS: dict[Kind, str] = {
    "equalize": "an equalization",
    "scaling": "a scaling of channels",
    "rounding": "a rounding of weights",
    "ranges": "a method for the ranges of activations",
    "bias": "a correction of biases",
}
_OWN = ("equalize", *get_args(Scaling), *get_args(Rounding), "bias")
# Those that look at a layer's whole output.
FROM_GRAM = frozenset({"weighted", "output", "gptq"})


@dataclass(frozen=True, kw_only=True)
class Methods:
    """The parts of a method; None or False where a kind is not among them.

    Attributes:
        equalize: equalize the channels between layers first.
        scaling: what the channels of inputs are scaled by.
        rounding: how weights are rounded.
        ranges: the calibrator of activations.
        bias: let biases take up the mean of the error.
    """

    equalize: bool = False
    scaling: Scaling | None = None
    rounding: Rounding | None = None
    ranges: str | None = None
    bias: bool = False

    @property
    def for_weights(self) -> bool:
        """Whether any part bears on a model whose activations stay in float."""
        return self.equalize or self.scaling == "awq" or self.rounding is not None or self.bias

    @property
    def ranges_beside(self) -> str | None:
        """The calibrator of what smoothing leaves as it is, where none is named; None where nothing is smoothed.

        Of probabilities and of what is small almost everywhere KL clips what matters: on a small Llama everything.
        """
        return self.ranges or ("mse" if self.scaling == "smoothquant" else None)

    @property
    def needs_gram(self) -> bool:
        """Whether a part needs Gram matrices."""
        return self.scaling == "awq" or self.rounding in FROM_GRAM

    @property
    def needs_data(self) -> bool:
        """Whether a part needs anything of calibration, though activations stay in float."""
        return self.needs_gram or self.bias

    def __str__(self) -> str:
        parts = (
            "equalize" if self.equalize else None,
            self.scaling,
            self.rounding,
            self.ranges,
            "bias" if self.bias else None,
        )
        return "+".join(part for part in parts if part)


def parse_methods(text: str, *, weights_alone: bool = False) -> Methods:
    """Read a method.

    Args:
        text: its parts, joined by "+".
        weights_alone: activations stay in float, so "mse" is how weights are rounded; else it is how ranges are found.

    Raises:
        UnknownNameError: a part that is unknown, that is not for weights where they alone are quantized, or a second
            one of a kind.
    """
    words = [word.strip() for word in text.split("+")]
    found: dict[Kind, str] = {}
    for word in words:
        kind = _kind(word, weights_alone)
        if kind is None and word == text and not weights_alone and not _near(word, _OWN):
            # Whoever makes the calibrator says which there are.
            kind = "ranges"
        if kind is None:
            raise UnknownNameError(_unknown(text, word, weights_alone))
        if kind in found:
            same = (
                "it is there twice"
                if word == found[kind]
                else f"{found[kind]} and {word} are each {_KINDS[kind]}"
            )
            raise UnknownNameError(f"method {text}: {same}; keep one of them.")
        found[kind] = word
    return Methods(
        equalize="equalize" in found,
        scaling=cast(Scaling | None, found.get("scaling")),
        rounding=cast(Rounding | None, found.get("rounding")),
        ranges=found.get("ranges"),
        bias="bias" in found,
    )


def protecting_parts(text: str) -> list[str]:
    """Return the parts of a method but for that of the ranges of activations."""
    return [word for word in text.split("+") if _kind(word, weights_alone=False) not in ("ranges", None)]


def _kind(word: str, weights_alone: bool) -> Kind | None:
    if word in ("equalize", "bias"):
        return cast(Kind, word)
    if word in get_args(Scaling):
        return None if weights_alone and word == "smoothquant" else "scaling"
    if word in get_args(Rounding) and (weights_alone or word != "mse"):
        return "rounding"
    return "ranges" if not weights_alone and word in list_calibrators() else None


def _unknown(text: str, word: str, weights_alone: bool) -> str:
    where = f"method {text}" if word == text else f"method {text}: {word or 'an empty part'}"
    if weights_alone and (word == "smoothquant" or word in list_calibrators()):
        return (
            f"{where}: for activations, and here weights alone are quantized; choose awq, gptq, mse or amax, or leave "
            "it out."
        )
    known = [name for name in _OWN if not (weights_alone and name == "smoothquant")]
    if not weights_alone:
        known += [name for name in list_calibrators() if name not in known and " " not in name]
    near = _near(word, known)
    return f"{where}: no such method; " + (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"choose one of {', '.join(known)}, or several with +."
    )


def _near(word: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(word, known, n=3, cutoff=0.5)
