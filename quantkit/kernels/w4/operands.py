"""Weights of four bits on the GPU, and the memory in which blocks that share a tile of D leave their sums."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantkit.errors import KernelError
from quantkit.formats.quantize import QTensor
from quantkit.kernels import device as gpu
from quantkit.kernels.gemm_operands import PackedWeight
from quantkit.kernels.w4.form import Layout4, Packed4
from quantkit.kernels.w4.launch import W4Launch
from quantkit.kernels.w4.layout import pack4
from quantkit.kernels.w4.mma_launch import W4MmaLaunch


@dataclass(frozen=True, kw_only=True)
class PackedWeight4(PackedWeight):
    """A weight of four bits laid out for the kernels, the same for all of them, on the device.

    data: its codes. scale: float32, one a row, what sums are multiplied by. format: of its codes. group_scales, zeros:
    as in `form.Packed4`.
    """

    layout: Layout4
    group_scales: Any
    zeros: Any

    def as_operand_of(self, activations: str) -> PackedWeight:
        """Return what `check_product` looks at: a weight of the activations' own format."""
        plain = PackedWeight(
            data=self.data, scale=self.scale, n=self.n, k=self.k, format=self.format, arch=self.arch
        )
        return replace(plain, format=activations)


class Workspace4:
    """Memory on the current GPU in which blocks that share a tile leave their sums. One launch at a time may use it.

    size_bytes: for sums; 64 MB are enough for every tile on 132 multiprocessors. counters: one for each tile that is
    shared, and consumer.
    """

    def __init__(self, size_bytes: int = 64 << 20, counters: int = 1 << 14) -> None:
        cupy = gpu.cupy()
        self.partials = cupy.empty(size_bytes, np.uint8)
        self.arrivals = cupy.zeros(counters, np.uint32)

    def holds(self, launch: W4Launch | W4MmaLaunch) -> bool:
        """Return whether a launch fits."""
        return bool(self.partials.nbytes >= launch.partials_bytes and self.arrivals.size >= launch.arrivals)


def pack_weight4(
    weight: QTensor,
    *,
    scale_type: str | None = None,
    activation_bits: int = 16,
    activations: str | None = None,
    arch: str | None = None,
) -> PackedWeight4:
    """Return `weight` [n, k] on the current GPU; what is taken, and how, is what `layout.pack4` says.

    Raises:
        KernelError: a weight that the kernels have not, or no GPU.
    """
    packed = pack4(weight, scale_type=scale_type, activation_bits=activation_bits, activations=activations)
    return upload4(packed, arch=arch)


def upload4(packed: Packed4, *, arch: str | None = None) -> PackedWeight4:
    """Return a packed weight on the current GPU."""
    cupy = gpu.cupy()
    scales, zeros = (None if part is None else cupy.asarray(part) for part in (packed.scales, packed.zeros))
    layout = packed.layout
    return PackedWeight4(
        data=cupy.asarray(packed.codes),
        scale=cupy.asarray(packed.channel_scale),
        n=layout.n,
        k=layout.k,
        format=layout.codes,
        arch=arch or gpu.architecture(gpu.current()),
        layout=layout,
        group_scales=scales,
        zeros=zeros,
    )


# Of each device and stream. The counters of a workspace are zero between launches.
_workspaces: dict[tuple[int, int], Workspace4] = {}


def workspace_of(
    device: int, stream: int, launch: W4Launch | W4MmaLaunch, given: Workspace4 | None
) -> Workspace4:
    """Return the given workspace, or the one that the calls of a stream share, grown when it must be.

    Raises:
        KernelError: the given one is too small.
    """
    if given is not None:
        if not given.holds(launch):
            raise KernelError(
                f"workspace: {given.partials.nbytes} bytes and {given.arrivals.size} counters; this product takes "
                f"{launch.partials_bytes} and {launch.arrivals}."
            )
        return given
    held = _workspaces.get((device, stream))
    if held is None or not held.holds(launch):
        # What it replaces goes back to the pool of this stream, whose next use comes after the launches before.
        held = Workspace4(max(launch.partials_bytes, 1 << 20), max(launch.arrivals, 1 << 12))
        _workspaces[device, stream] = held
    return held
