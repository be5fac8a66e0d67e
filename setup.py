"""The one part of the build that pyproject.toml cannot say: a C extension that installing may do without."""

import sys
import sysconfig

from setuptools import Extension, setup

# One binary for every Python from 3.11 on; Python without the GIL has no such interface yet.
stable = not sysconfig.get_config_var("Py_GIL_DISABLED")
# -fopenmp-simd: sums may be added in any order where a pragma says so, and nowhere else.
flags = ["/O2", "/std:c11"] if sys.platform == "win32" else ["-O3", "-std=gnu11", "-fopenmp-simd"]

setup(
    ext_modules=[
        Extension(
            "quantkit.statistics._native",
            ["quantkit/statistics/_native.c"],
            extra_compile_args=flags,
            define_macros=[("Py_LIMITED_API", "0x030B0000")] if stable else [],
            py_limited_api=stable,
            # Without a compiler NumPy takes its place.
            optional=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if stable else {},
)
