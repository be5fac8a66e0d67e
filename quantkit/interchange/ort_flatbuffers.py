"""The flatbuffers of ONNX Runtime's calibration table: a list of pairs of strings.

    table TrtTable { dict: [KeyValue]; }    table KeyValue { key: string; value: string; }

Reading checks every offset against the file's length: the library trusts them, so a file that is cut short would give
nonsense. Writing leaves the layout to the library, and so gives the bytes that ONNX Runtime's writer gives.

Source: onnxruntime `ort_trt_int8_cal_table.fbs`; https://flatbuffers.dev/internals.
"""

import struct
from collections.abc import Sequence

from quantkit.errors import CacheError


def read_pairs(content: bytes, what: str) -> list[tuple[str, str]]:
    """Return the pairs, in the file's order.

    Raises:
        CacheError: not such a table, or cut short.
    """
    try:
        found = _Table(content, _reference(content, 0))
        entries = found.field(0)
        if entries is None:
            return []
        count = _unsigned(content, entries)
        if count > len(content) // 4:
            raise ValueError(f"a list of {count}")
        pairs = [_Table(content, _reference(content, entries + 4 + 4 * i)) for i in range(count)]
        return [(pair.string(0), pair.string(1)) for pair in pairs]
    except (ValueError, struct.error) as error:
        raise CacheError(
            f"{what}: not a flatbuffers calibration table of ONNX Runtime, or a damaged one ({error}); "
            "copy it again, or import the calibration.json that lies beside it."
        ) from error


def write_pairs(pairs: Sequence[tuple[str, str]]) -> bytes:
    """Return the bytes of the table; its list is in the opposite order, as ONNX Runtime's is."""
    from flatbuffers import Builder

    builder = Builder(1024)
    entries = []
    for key, value in pairs:
        strings = [builder.CreateString(key), builder.CreateString(value)]
        builder.StartObject(2)
        for slot, string in enumerate(strings):
            builder.PrependUOffsetTRelativeSlot(slot, string, 0)
        entries.append(builder.EndObject())
    builder.StartVector(4, len(entries), 4)
    for entry in entries:
        builder.PrependUOffsetTRelative(entry)
    vector = builder.EndVector()
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, vector, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


class _Table:
    """A table: at its start the distance back to its vtable, which has the place of every field."""

    def __init__(self, content: bytes, at: int) -> None:
        self._content = content
        self._at = at
        (back,) = struct.unpack("<i", _slice(content, at, 4))
        self._vtable = at - back
        (self._vtable_bytes,) = struct.unpack("<H", _slice(content, self._vtable, 2))

    def field(self, slot: int) -> int | None:
        """Where the vector or string of a field begins; None where the field is not there."""
        entry = 4 + 2 * slot
        if entry + 2 > self._vtable_bytes:
            return None
        (offset,) = struct.unpack("<H", _slice(self._content, self._vtable + entry, 2))
        return _reference(self._content, self._at + offset) if offset else None

    def string(self, slot: int) -> str:
        """The text of a field."""
        at = self.field(slot)
        if at is None:
            raise ValueError("a pair without its key or value")
        return _slice(self._content, at + 4, _unsigned(self._content, at)).decode()


def _reference(content: bytes, at: int) -> int:
    return at + _unsigned(content, at)


def _unsigned(content: bytes, at: int) -> int:
    value: int = struct.unpack("<I", _slice(content, at, 4))[0]
    return value


def _slice(content: bytes, at: int, length: int) -> bytes:
    if not 0 <= at <= len(content) - length:
        raise ValueError(f"{length} bytes at {at} of {len(content)}")
    return content[at : at + length]
