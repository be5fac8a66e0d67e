"""How quantize.cu is launched for a specification and a matrix: macros and sizes, as plain values.

The CuPy launcher and the emulator's tests both launch from this, so what the tests run is what a GPU runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantkit.errors import KernelError
from quantkit.formats.format import E8M0, FP4_E2M1, FP8_E4M3, INT8, UINT8
from quantkit.formats.spec import QuantSpec

SOURCE = Path(__file__).parent / "cuda" / "quantize.cu"
KERNEL = "quantize"

CHUNK = 8  # neighbouring elements that a thread takes at a time
# Chunks that a thread takes in a span, and that it can hold where this keeps a long row in registers.
_CHUNKS, _MOST_CHUNKS = 4, 8

INPUTS = {"float32": "INPUT_F32", "float16": "INPUT_F16", "bfloat16": "INPUT_BF16"}
_CODES = {
    INT8.name: "CODES_S8",
    UINT8.name: "CODES_U8",
    FP8_E4M3.name: "CODES_E4M3",
    FP4_E2M1.name: "CODES_E2M1",
}
_NORMS = {"none": "NORM_NONE", "rms": "NORM_RMS", "layer": "NORM_LAYER"}


@dataclass(frozen=True, kw_only=True)
class QuantizeKind:
    """What the kernel is compiled for.

    x_type: float32, float16 or bfloat16. norm: none, rms or layer, with norm_weight and norm_bias where it has them.
    multiply: a factor for each column. zero_point: other than the middle code.
    """

    x_type: str
    spec: QuantSpec
    norm: Literal["none", "rms", "layer"] = "none"
    norm_weight: bool = False
    norm_bias: bool = False
    multiply: bool = False
    zero_point: bool = False

    @property
    def whole_rows(self) -> bool:
        """Whether something is known of a row only when all of it was seen."""
        return self.spec.dynamic == "token" or self.norm != "none"


@dataclass(frozen=True, kw_only=True)
class QuantizeLaunch:
    """One launch of quantize: its macros and sizes. row_threads: threads that share a row, which fixes the order in
    which a norm's sums are added."""

    defines: dict[str, str | int]
    grid: tuple[int, int]
    block: int
    shared_bytes: int
    row_threads: int


def row_threads(columns: int, kind: QuantizeKind) -> int:
    """Return how many threads share a row: it depends on nothing but the row, so neither do a norm's results."""
    chunks = -(-columns // CHUNK)
    least = max(8, (kind.spec.block_size or 0) // CHUNK)
    most = 512 if kind.whole_rows else 256
    wanted = 1 << (-(-chunks // _CHUNKS) - 1).bit_length()
    return min(max(wanted, least), most)


def launch_of(kind: QuantizeKind, rows: int, columns: int, *, vector: bool) -> QuantizeLaunch:
    """Return the launch that quantizes a matrix [rows, columns].

    Its arguments are, in this order: x, codes, scales; static scale, global scale, norm's weight and bias, the
    multiplier (null pointers where there are none); the zero point less the middle code, epsilon (float32); rows,
    columns (int32); from one row to the next in x (elements), in the codes (bytes) and in the scales (int64).

    vector: columns are a multiple of 8, and rows of x and of the codes, and vectors, start at multiples of 16 bytes.

    Raises:
        KernelError: a specification that the kernel does not know.
    """
    check_spec(kind.spec)
    threads = row_threads(columns, kind)
    chunks = -(-columns // (CHUNK * threads))
    plain = kind.whole_rows and kind.norm == "none" and not kind.multiply
    if chunks > (_MOST_CHUNKS if plain else _CHUNKS):
        chunks = _CHUNKS
    span = threads * chunks * CHUNK
    together = max(1, 128 // threads)
    spans = -(-columns // span)
    spec = kind.spec
    sharing = {"token": "TOKEN", "block": "BLOCKS", None: "STATIC"}[spec.dynamic]
    scales = (
        "SCALES_F32"
        if spec.scale_format is None
        else "SCALES_E8M0"
        if spec.scale_format == E8M0
        else "SCALES_E4M3"
    )
    return QuantizeLaunch(
        defines={
            "INPUT": INPUTS[kind.x_type],
            "CODES": _CODES[spec.format.name],
            "SHARING": sharing,
            "BLOCK": spec.block_size or CHUNK,
            "SCALES": scales,
            "NORM": _NORMS[kind.norm],
            "NORM_WEIGHT": int(kind.norm_weight),
            "NORM_BIAS": int(kind.norm_bias),
            "MULTIPLY": int(kind.multiply),
            "ZERO": int(kind.zero_point),
            "ROW_THREADS": threads,
            "ROWS": together,
            "CHUNKS": chunks,
            "RESIDENT": int(not kind.whole_rows or spans == 1),
            "VECTOR": int(vector),
            "FULL": int(columns % span == 0),
        },
        grid=(-(-rows // together), 1 if kind.whole_rows else spans),
        block=threads * together,
        shared_bytes=threads * together // 32 * 4,
        row_threads=threads,
    )


def check_spec(spec: QuantSpec) -> None:
    """Raise KernelError unless quantize.cu makes codes of `spec`."""
    name, block = str(spec), spec.block_size
    blocked = block is not None or spec.block_shape is not None
    power_of_two = block is not None and block & (block - 1) == 0 and 16 <= block <= 256
    needs = spec.format == FP4_E2M1 and spec.scale_format is None
    complaints = [
        (spec.format.name not in _CODES, f"no kernel makes {spec.format.name}; use {', '.join(_CODES)}"),
        (
            spec.dynamic == "tensor",
            "one block cannot see a whole tensor; give its scale, or quantize per token",
        ),
        (spec.dynamic is None and (blocked or spec.axis is not None), "a fixed scale is one for the tensor"),
        (spec.dynamic is not None and not spec.symmetric, "scales of its own have no zero point"),
        (spec.dynamic == "block" and spec.axis != -1, "blocks lie along the last axis; use axis −1"),
        (spec.dynamic == "block" and not power_of_two, f"blocks of {block}; use 16, 32, 64, 128 or 256"),
        (needs, "needs blocks with scales in e8m0 or e4m3"),
        (
            spec.scale_format == E8M0 and (spec.scale_rule != "rceil" or spec.format.kind != "float"),
            "e8m0 scales follow the rule rceil, of float codes",
        ),
        (
            spec.scale_format is not None and spec.scale_format not in (E8M0, FP8_E4M3),
            "scales are float32, e8m0 or fp8_e4m3",
        ),
    ]
    for wrong, complaint in complaints:
        if wrong:
            raise KernelError(f"quantize: {name}: {complaint}.")
