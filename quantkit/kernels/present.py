"""Which GPU is here, if any, and why not."""

from functools import lru_cache

from quantkit.errors import KernelError
from quantkit.kernels.compile import is_available
from quantkit.kernels.device import architecture, cupy
from quantkit.kernels.gpus import Gpu, describe_gpu


def why_no_gpu() -> str | None:
    """Return in a few words what keeps kernels from running here; None where nothing does."""
    try:
        count = int(cupy().cuda.runtime.getDeviceCount())
    except KernelError:
        return "CuPy is not installed: pip install 'quantkit[gpu]'"
    except Exception as error:
        # Each version of CUDA has its own way to say that there is no driver.
        return str(error).strip().splitlines()[0]
    if count == 0:
        return "CUDA counts none"
    return None if is_available() else "NVRTC is not installed: pip install 'quantkit[gpu]'"


def present_gpu(device: int = 0) -> Gpu:
    """Return what GPU `device` of this machine is.

    Raises:
        KernelError: there is none.
    """
    reason = why_no_gpu()
    if reason is not None:
        raise KernelError(f"no GPU here ({reason}); run this on a machine with an NVIDIA GPU.")
    return _present(device)


@lru_cache(maxsize=16)
def _present(device: int) -> Gpu:
    runtime = cupy().cuda.runtime
    facts = runtime.getDeviceProperties(device)
    name = facts["name"]
    attributes = cupy().cuda.Device(device).attributes
    return describe_gpu(
        name.decode() if isinstance(name, bytes) else str(name),
        architecture(device),
        multiprocessors=int(attributes["MultiProcessorCount"]),
        clock_khz=int(attributes.get("ClockRate", 0)),
        memory_khz=int(attributes.get("MemoryClockRate", 0)),
        bus_bits=int(attributes.get("GlobalMemoryBusWidth", 0)),
    )
