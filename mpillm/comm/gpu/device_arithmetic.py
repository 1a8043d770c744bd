"""Element-wise sums on a GPU, by CuPy on its current stream: the kernel's counterpart.

`library` is the module cupy. Tests without a GPU pass numpy, which has the same functions for all
types but bfloat16. bfloat16 is uint16 here: widened to float32, summed, and rounded to the nearest,
ties to even, as torch does.
"""

import functools
from typing import Any

# A NaN is made quiet before rounding: the carry of rounding alone could turn it into infinity.
BFLOAT16 = """
static __device__ __forceinline__ float mpillm_widen(unsigned short bits) {
    return __uint_as_float((unsigned int)bits << 16);
}
static __device__ __forceinline__ unsigned short mpillm_narrow(float value) {
    const unsigned int bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (unsigned short)((bits >> 16) | 0x40u);
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
"""
# A NaN on either side is the maximum and the minimum: max and min must not hide it.
COMBINED = {
    "sum": "c = mpillm_narrow(mpillm_widen(a) + mpillm_widen(b));",
    "max": "c = mpillm_widen(a) != mpillm_widen(a) || mpillm_widen(a) > mpillm_widen(b) ? a : b;",
    "min": "c = mpillm_widen(a) != mpillm_widen(a) || mpillm_widen(a) < mpillm_widen(b) ? a : b;",
}
UNIVERSAL = {"sum": "add", "max": "maximum", "min": "minimum"}


# Cached: CuPy compiles a kernel at its first use, which takes up to a second.
@functools.cache
def _bfloat16_combine(op: str) -> Any:
    import cupy

    return cupy.ElementwiseKernel(
        "uint16 a, uint16 b", "uint16 c", COMBINED[op], f"mpillm_bfloat16_{op}", preamble=BFLOAT16
    )


@functools.cache
def _scaling(element: str) -> Any:
    """Compile the scaling kernel; 16-bit floats are scaled in float32 and rounded once."""
    import cupy

    if element == "bfloat16":
        body = "y = mpillm_narrow(mpillm_widen(x) * (float)factor);"
        return cupy.ElementwiseKernel(
            "uint16 x, float64 factor", "uint16 y", body, "mpillm_bfloat16_scale", preamble=BFLOAT16
        )
    wide = "double" if element == "float64" else "float"
    return cupy.ElementwiseKernel(
        f"{element} x, float64 factor",
        f"{element} y",
        f"y = ({wide})x * ({wide})factor;",
        f"mpillm_{element}_scale",
    )


def combine(library: Any, element: str, op: str, target: Any, source: Any) -> None:
    """Compute target = target op source, in place; `op` is one of buffers.REDUCTIONS."""
    if element == "bfloat16":
        _bfloat16_combine(op)(target, source, target)
    else:
        getattr(library, UNIVERSAL[op])(target, source, out=target)


def scale(library: Any, element: str, target: Any, factor: float) -> None:
    """Multiply `target` by `factor`, in place."""
    if library.__name__ == "cupy":
        _scaling(element)(target, factor, target)
    else:
        target *= target.dtype.type(factor)
