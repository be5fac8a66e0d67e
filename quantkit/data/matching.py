"""Which array of a record feeds which input."""

import difflib
from collections.abc import Callable, Mapping, Sequence

from quantkit.data.files import NAMELESS, Header
from quantkit.data.inputs import InputSpec, array_type
from quantkit.errors import DataError

LABEL_NAMES = frozenset({"label", "labels", "target", "targets", "y"})
"""What labels are called when they lie beside the inputs."""


def match_names(
    where: str,
    headers: Mapping[str, Header],
    inputs: Sequence[InputSpec],
    mapping: Mapping[str, str],
    fits: Callable[[InputSpec, Header], bool],
) -> dict[str, str]:
    """Return {input: key}.

    `mapping` is obeyed; an input and a key of the same name belong together; the only input of a model takes
    the only array that fits it, labels aside.

    Raises:
        DataError: an input is left without an array, or `mapping` names what is not there.
    """
    _check_mapping(where, headers, inputs, mapping)
    matched = {s.name: mapping.get(s.name, s.name) for s in inputs}
    missing = [s for s in inputs if matched[s.name] not in headers]
    if not missing:
        return matched
    if len(inputs) == 1:
        (spec,) = inputs
        if NAMELESS in headers:
            return {spec.name: NAMELESS}
        keys = [key for key in headers if key.lower() not in LABEL_NAMES]
        if len(keys) > 1:
            keys = [key for key in keys if fits(spec, headers[key])]
        if len(keys) == 1:
            return {spec.name: keys[0]}
    raise DataError(
        f"{where}: {_found(headers)}; the model wants {_wanted(inputs)}; {_mend(missing, headers, matched)}."
    )


def _check_mapping(
    where: str, headers: Mapping[str, Header], inputs: Sequence[InputSpec], mapping: Mapping[str, str]
) -> None:
    if mapping and NAMELESS in headers:
        raise DataError(f"{where}: an array without a name was given names to look for; leave --input out.")
    names = [s.name for s in inputs]
    for name, key in mapping.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}."
            raise DataError(f"--input {name}={key}: the model has no input {name}; {hint}")
        if key not in headers:
            raise DataError(f"{where}: no array {key} for --input {name}={key}; {_found(headers)}.")


def _found(headers: Mapping[str, Header]) -> str:
    if not headers:
        return "no arrays found"
    return "found " + ", ".join(
        array_type(h.dtype, h.shape) if key == NAMELESS else f"{key}: {array_type(h.dtype, h.shape)}"
        for key, h in headers.items()
    )


def _wanted(inputs: Sequence[InputSpec]) -> str:
    return ", ".join(str(s) for s in inputs)


def _mend(missing: Sequence[InputSpec], headers: Mapping[str, Header], matched: Mapping[str, str]) -> str:
    if NAMELESS in headers:
        return "store one .npz a sample whose keys are the inputs' names"
    spec = missing[0]
    spare = [key for key in headers if key not in matched.values()]
    if not spare:
        return f"add an array {spec.name}"
    near = difflib.get_close_matches(spec.name, spare, n=1, cutoff=0.3)
    return f"name the arrays as the inputs, or say --input {spec.name}={near[0] if near else 'KEY'}"
