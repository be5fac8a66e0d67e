"""Safetensors files written tensor by tensor, in shards where there is much: no more than one need be in memory.

A file is 8 bytes for the length of the header, the header in JSON, then the tensors one after the other without gaps.
The length of a header is known before anything is computed, for its entries are.

Source: https://huggingface.co/docs/safetensors, section "Format"; the index of shards as in Hugging Face's
transformers, `model.safetensors.index.json`.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

# As transformers and vLLM look for them.
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Beyond this a model is cut into shards, as Hugging Face's own.
SHARD_BYTES = 5 * 10**9

_NAMES: Mapping[np.dtype, str] = {
    np.dtype(dtype): name
    for dtype, name in (
        (np.bool_, "BOOL"),
        (np.uint8, "U8"),
        (np.int8, "I8"),
        (np.int16, "I16"),
        (np.int32, "I32"),
        (np.int64, "I64"),
        (np.float16, "F16"),
        (ml_dtypes.bfloat16, "BF16"),
        (np.float32, "F32"),
        (np.float64, "F64"),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3"),
        (ml_dtypes.float8_e5m2, "F8_E5M2"),
    )
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor to write.

    Attributes:
        name: what it is called in the file.
        dtype, shape: its element type and shape.
        parts: makes its contents, one piece after the other along the first axis; called when it is written.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[NDArray[Any]]]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored(name: str, array: NDArray[Any]) -> StoredTensor:
    """Return an array, as it is, as a tensor to write."""
    return StoredTensor(name=name, dtype=array.dtype, shape=array.shape, parts=lambda: [array])


def write_safetensors(
    tensors: Iterable[StoredTensor], folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `model.safetensors` into a folder, or shards of at most `shard_bytes` with their index.

    A tensor that is larger than a shard has one for itself. The same tensors give the same bytes.
    """
    shards = _shards(list(tensors), shard_bytes)
    if len(shards) == 1:
        _write(shards[0], folder / FILE)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(shard, folder / name)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Sequence[StoredTensor], shard_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write(tensors: Sequence[StoredTensor], path: Path) -> None:
    # The widest elements first: without gaps, every tensor then starts at a multiple of its element's size.
    ordered = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered:
            written = 0
            for part in tensor.parts():
                whole = np.ascontiguousarray(part, tensor.dtype)
                file.write(whole.reshape(-1).view(np.uint8).data)
                written += whole.nbytes
            assert written == tensor.nbytes, f"{tensor.name}: {written} bytes instead of {tensor.nbytes}"


@dataclass(frozen=True, kw_only=True)
class ReadTensor:
    """A tensor in a file, read when it is asked for."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def array(self) -> NDArray[Any]:
        """Return its contents."""
        count = math.prod(self.shape)
        return np.fromfile(self.path, self.dtype, count, offset=self.offset).reshape(self.shape)


def read_safetensors(folder: Path) -> dict[str, ReadTensor]:
    """Return the tensors of a folder by name, from its shards where it has some.

    Raises:
        ValueError: a file is damaged, or a tensor is not in the shard that the index names.
    """
    if not (folder / INDEX).exists():
        return dict(_read(folder / FILE))
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    found: dict[str, ReadTensor] = {}
    for name in dict.fromkeys(weight_map.values()):
        found |= _read(folder / name)
    wrong = [name for name, file in weight_map.items() if name not in found or found[name].path.name != file]
    if wrong or len(found) != len(weight_map):
        raise ValueError(f"the index and the shards differ ({wrong[0] if wrong else 'tensors left out'})")
    return found


def _read(path: Path) -> Iterator[tuple[str, ReadTensor]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    size, end = path.stat().st_size - 8 - length, 0
    for name, entry in sorted(header.items(), key=lambda item: tuple(item[1]["data_offsets"])):
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        if start != end or stop - start != math.prod(shape) * dtype.itemsize or stop > size:
            raise ValueError(f"{path.name}: {name} lies at {start} … {stop} of {size} bytes")
        end = stop
        yield name, ReadTensor(path=path, offset=8 + length + start, dtype=dtype, shape=shape)
    if end != size:
        raise ValueError(f"{path.name}: {size - end} bytes are no tensor's")
