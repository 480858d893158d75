"""exp and sigmoid for compiled loops: in fp32 they become vector instructions.

numba calls libm once per element, which costs a loop over channels ten times its time. The fp32 exponential
here is Cody and Waite's: x = n·ln 2 + r with |r| ≤ ln 2 / 2, a polynomial of degree 7 in r (coefficients of
Moshier's Cephes, expf), and 2ⁿ written into the exponent bits. Its error stays under 2 units in the last
place; NaN stays NaN; beyond ±87, where fp32 itself ends, it is constant. fp64 is libm's.

numba's cache does not see a change in this file: touch the kernels' files after editing it.
"""

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic, overload

_LIMIT = np.float32(87.0)
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits of the significand
_C7, _C6, _C5 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C4, _C3, _C2 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE = np.float32(1.0)


def exp(x: Any) -> Any:
    """Return eˣ of a float, inside a numba kernel."""
    return math.exp(x)


def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + e⁻ˣ) of a float, inside a numba kernel."""
    return 1.0 / (1.0 + exp(-x))


@intrinsic  # type: ignore[untyped-decorator]
def _power_of_two(_context: Any, shifted: Any) -> Any:
    """Return 2ⁿ from x·log₂e + _ROUND: its low bits hold n, which moves to where a float keeps its exponent."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], ir.IntType(32))
        exponent = builder.shl(bits, ir.Constant(ir.IntType(32), 23))
        return builder.bitcast(builder.add(exponent, ir.Constant(ir.IntType(32), 127 << 23)), ir.FloatType())

    return numba.float32(numba.float32), generate


@overload(exp)  # type: ignore[untyped-decorator]
def _exp(x: Any) -> Callable[[Any], Any]:
    def libm(x: Any) -> Any:
        return math.exp(x)

    def polynomial(x: Any) -> Any:
        x = -_LIMIT if x < -_LIMIT else x
        x = _LIMIT if x > _LIMIT else x
        shifted = x * _LOG2_E + _ROUND
        n = shifted - _ROUND
        r = x - n * _LN2_HIGH - n * _LN2_LOW
        p = (((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2) * r * r + r + _ONE
        return p * _power_of_two(shifted)

    return polynomial if x == numba.float32 else libm


@overload(sigmoid)  # type: ignore[untyped-decorator]
def _sigmoid(x: Any) -> Callable[[Any], Any]:
    one = _ONE if x == numba.float32 else 1.0

    def logistic(x: Any) -> Any:
        return one / (one + exp(-x))

    return logistic
