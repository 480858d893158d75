"""Sixteen channels as one value: a vector type for numba kernels.

Inside a kernel ``load`` gives a vector, ``+ - * /`` act on all lanes (a Python float stands for the same number in
every lane), and LLVM turns each into one AVX-512 instruction, two AVX2 or four SSE or NEON ones. Loops over 16
elements would leave that to the compiler's auto-vectorizer, which gives up where arrays might overlap.

``a * b + c`` may be fused (one rounding instead of two); nothing else is reordered, so infinity and NaN go where
IEEE 754 sends them. ``exp2`` and ``log1p`` are minimax polynomials (Remez, for the intervals given there) after an
exact range reduction, with errors below 2 units in the last place in fp32 and fp64.

numba's cache does not see a change in this file: touch kernels.py after editing it.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, lower_cast, models, overload, register_model

LANES = 16

_FUSED = ("contract",)
_INT = ir.IntType(32)


class Lanes(types.Type):  # type: ignore[misc]
    """numba's type of 16 floats of one dtype."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(f"Lanes({dtype})")


@register_model(Lanes)  # type: ignore[untyped-decorator]
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        scalar = ir.FloatType() if lanes.dtype == types.float32 else ir.DoubleType()
        super().__init__(manager, lanes, ir.VectorType(scalar, LANES))


def _repeat(builder: Any, scalar: Any) -> Any:
    vector = ir.VectorType(scalar.type, LANES)
    if isinstance(scalar, ir.Constant):
        return ir.Constant(vector, [scalar] * LANES)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES))


@lower_cast(types.Float, Lanes)  # type: ignore[untyped-decorator]
def _float_to_lanes(context: Any, builder: Any, source: Any, target: Any, value: Any) -> Any:
    return _repeat(builder, context.cast(builder, value, source, target.dtype))


def _define(python_operator: Callable[..., Any], arity: int, instruction: str) -> None:
    """Let ``python_operator`` act on lanes, or on lanes and floats."""

    class Template(AbstractTemplate):  # type: ignore[misc]
        def generic(self, arguments: Any, _keywords: Any) -> Any:
            lanes = [argument for argument in arguments if isinstance(argument, Lanes)]
            if not lanes or not all(isinstance(argument, (Lanes, types.Float)) for argument in arguments):
                return None
            return signature(lanes[0], *[lanes[0]] * len(arguments))

    infer_global(python_operator)(Template)

    @lower_builtin(python_operator, *[Lanes] * arity)  # type: ignore[untyped-decorator]
    def lower(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return getattr(builder, instruction)(*arguments, flags=_FUSED)


_define(operator.add, 2, "fadd")
_define(operator.sub, 2, "fsub")
_define(operator.mul, 2, "fmul")
_define(operator.truediv, 2, "fdiv")
_define(operator.neg, 1, "fneg")


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, index: Any, vector: Any = None) -> Any:
    data = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data
    address = builder.gep(data, [index])
    return address if vector is None else builder.bitcast(address, vector.as_pointer())


def _row(builder: Any, index: Any) -> Any:
    return builder.mul(index, ir.Constant(index.type, LANES))


@intrinsic  # type: ignore[untyped-decorator]
def get(_context: Any, rows: Any, index: Any) -> Any:
    """Return row ``index`` of an array of rows of 16 floats; unchecked."""
    lanes = Lanes(rows.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = context.get_value_type(lanes)
        start = _row(builder, arguments[1])
        pointer = _pointer(context, builder, signature.args[0], arguments[0], start, vector)
        return builder.load(pointer, align=rows.dtype.bitwidth // 8, typ=vector)

    return lanes(rows, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def put(_context: Any, rows: Any, index: Any, value: Any) -> Any:
    """Write ``value`` to row ``index`` of an array of rows of 16 floats; unchecked."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, value = arguments
        pointer = _pointer(context, builder, signature.args[0], array, _row(builder, index), value.type)
        builder.store(value, pointer, align=rows.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(rows, types.intp, Lanes(rows.dtype)), generate


def _mask(builder: Any, count: Any) -> Any:
    """Return which of 16 lanes are below ``count``."""
    number = ir.Constant(ir.VectorType(count.type, LANES), list(range(LANES)))
    return builder.icmp_signed("<", number, _repeat(builder, count))


@intrinsic  # type: ignore[untyped-decorator]
def load(_context: Any, array: Any, start: Any, count: Any) -> Any:
    """Return ``count`` elements of an array from ``start``, counted flat, and 0 in the other lanes; unchecked."""
    lanes = Lanes(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = context.get_value_type(lanes)
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1], vector)
        mask = _mask(builder, arguments[2])
        function_type = ir.FunctionType(vector, [pointer.type, _INT, mask.type, vector])
        name = f"llvm.masked.load.v{LANES}f{array.dtype.bitwidth}.p0"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        alignment = ir.Constant(_INT, array.dtype.bitwidth // 8)
        return builder.call(function, [pointer, alignment, mask, ir.Constant(vector, None)])

    return lanes(array, types.intp, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(_context: Any, array: Any, start: Any, count: Any, value: Any) -> Any:
    """Write the first ``count`` lanes to an array from ``start``, counted flat; unchecked."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_value, start, count, value = arguments
        pointer = _pointer(context, builder, signature.args[0], array_value, start, value.type)
        mask = _mask(builder, count)
        function_type = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, _INT, mask.type])
        name = f"llvm.masked.store.v{LANES}f{array.dtype.bitwidth}.p0"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        builder.call(function, [value, pointer, ir.Constant(_INT, array.dtype.bitwidth // 8), mask])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, Lanes(array.dtype)), generate


@intrinsic  # type: ignore[untyped-decorator]
def gather(_context: Any, array: Any, start: Any, step: Any, count: Any) -> Any:
    """Return elements ``start``, ``start + step`` … in the first ``count`` lanes and 0 in the others; unchecked."""
    lanes = Lanes(array.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_value, start, step, count = arguments
        vector = context.get_value_type(lanes)
        last = builder.sub(count, ir.Constant(count.type, 1))
        value = ir.Constant(vector, ir.Undefined)
        for lane in range(LANES):
            number = ir.Constant(count.type, lane)
            within = builder.select(builder.icmp_signed("<", number, count), number, last)
            index = builder.add(start, builder.mul(within, step))
            element = builder.load(_pointer(context, builder, signature.args[0], array_value, index))
            value = builder.insert_element(value, element, ir.Constant(_INT, lane))
        return builder.select(_mask(builder, count), value, ir.Constant(vector, None))

    return lanes(array, types.intp, types.intp, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def scatter(_context: Any, array: Any, start: Any, step: Any, count: Any, value: Any) -> Any:
    """Write the first ``count`` lanes to elements ``start``, ``start + step`` …, counted flat; unchecked."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_value, start, step, count, value = arguments
        for lane in range(LANES):
            number = ir.Constant(count.type, lane)
            with builder.if_then(builder.icmp_signed("<", number, count)):
                index = builder.add(start, builder.mul(number, step))
                pointer = _pointer(context, builder, signature.args[0], array_value, index)
                builder.store(builder.extract_element(value, ir.Constant(_INT, lane)), pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, types.intp, Lanes(array.dtype)), generate


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(_context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of an element, counted flat; it may lie outside of the array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature.args[0], *arguments)
        function_type = ir.FunctionType(ir.VoidType(), [pointer.type, _INT, _INT, _INT])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
        builder.call(function, [pointer, *(ir.Constant(_INT, argument) for argument in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def spread(_context: Any, array: Any, index: Any) -> Any:
    """Return one element of a C-contiguous array, counted flat, in every lane; unchecked."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _repeat(builder, builder.load(_pointer(context, builder, signature.args[0], *arguments)))

    return Lanes(array.dtype)(array, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def fill(_context: Any, like: Any, value: Any) -> Any:
    """Return the float ``value`` in every lane, in the dtype of ``like`` (an array or lanes)."""
    lanes = Lanes(like.dtype)

    def generate(_context: Any, _builder: Any, _signature: Any, arguments: Any) -> Any:
        return arguments[1]

    return lanes(like, lanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def where_greater(_context: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """Return ``yes`` in the lanes where a > b and ``no`` elsewhere, also where a or b is NaN."""
    lanes = next(argument for argument in (a, b, yes, no) if isinstance(argument, Lanes))

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments[:2]), *arguments[2:])

    return lanes(lanes, lanes, lanes, lanes), generate


@intrinsic  # type: ignore[untyped-decorator]
def lane_sum(_context: Any, value: Any) -> Any:
    """Return the sum of the 16 lanes, added in halves (the same order every time)."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        vector = arguments[0].type
        function_type = ir.FunctionType(vector.element, [vector.element, vector])
        name = f"llvm.vector.reduce.fadd.v{LANES}f{value.dtype.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        zero = ir.Constant(vector.element, -0.0)
        return builder.call(function, [zero, arguments[0]], fastmath=("reassoc",))

    return value.dtype(value), generate


@intrinsic  # type: ignore[untyped-decorator]
def _polynomial(_context: Any, x: Any, coefficients: Any) -> Any:
    """Return Σ coefficients[k]·xᵏ by Horner's rule."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        scalars = cgutils.unpack_tuple(builder, arguments[1])
        constants = [_repeat(builder, context.cast(builder, c, types.float64, x.dtype)) for c in scalars]
        result = constants.pop()
        while constants:
            product = builder.fmul(result, arguments[0], flags=_FUSED)
            result = builder.fadd(product, constants.pop(), flags=_FUSED)
        return result

    return x(x, coefficients), generate


_SIGNIFICAND = {types.float32: 23, types.float64: 52}


@intrinsic  # type: ignore[untyped-decorator]
def _exponent_from_low_bits(_context: Any, x: Any) -> Any:
    """Return the float whose exponent bits are the low bits of x: 2^(low bits - bias), 0 where they are 0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        integers = ir.VectorType(ir.IntType(x.dtype.bitwidth), LANES)
        distance = ir.Constant(integers, [_SIGNIFICAND[x.dtype]] * LANES)
        return builder.bitcast(
            builder.shl(builder.bitcast(arguments[0], integers), distance), arguments[0].type
        )

    return x(x), generate


# fmt: off
# 2·2^f for |f| ≤ 1/2, relative error 2e-9 and 3e-18, exact at f = 0 (decays near 1 lose no history).
_TWICE_EXP2 = {
    types.float32: (
        2.0, 1.386294405709965, 0.4804529582723739, 0.11100664942514374,
        0.019236874716877638, 0.0026797748756469853, 0.00030706723572789256,
    ),
    types.float64: (
        2.0, 1.3862943611198906, 0.4804530139182026, 0.11100821732964017,
        0.01923625821518824, 0.0026667116293549297, 0.00030807060914222724, 3.050546698619188e-05,
        2.6430870565361327e-06, 2.0356399172895817e-07, 1.4147566368916623e-08, 8.869537857252671e-10,
    ),
}

# 2·artanh(s)/s as a polynomial in s² for s² ≤ 1/9, relative error 4e-9 and 3e-20.
_TWICE_ARTANH = {
    types.float32: (
        2.000000007921038, 0.6666631468212848, 0.40024910279538123,
        0.27960602747171465, 0.28178335086734546,
    ),
    types.float64: (
        2.0, 0.6666666666666669, 0.39999999999992686, 0.2857142857264878,
        0.22222222117237758, 0.1818182350102939, 0.15384445000474425, 0.13336911507644755,
        0.1171489944577989, 0.10979136148647863, 0.06970831530381509, 0.16503944742560886,
    ),
}
# fmt: on


def exp2(x: Any) -> Any:
    """Return 2ˣ in a kernel: 0 below the normal numbers (2⁻¹²⁵·⁵ in fp32), infinity above them, NaN for NaN."""
    raise NotImplementedError("only inside a numba kernel")


@overload(exp2)  # type: ignore[untyped-decorator]
def _exp2(x: Any) -> Callable[[Any], Any]:
    coefficients = _TWICE_EXP2[x.dtype]
    significand = _SIGNIFICAND[x.dtype]
    bias = 2 ** (x.dtype.bitwidth - significand - 2) - 1
    # Adding this rounds x to the integer n and leaves n - 1 + bias, the exponent bits of 2^(n-1), in the low bits.
    # The other factor 2 is in the coefficients: so n may reach bias + 1, where 2^x overflows as it should.
    rounder = 1.5 * 2.0**significand + (bias - 1)
    lowest, highest = 1.0 - bias, bias + 2.0

    def implementation(x: Any) -> Any:
        x = where_greater(lowest, x, lowest, x)
        x = where_greater(x, highest, highest, x)
        rounded = x + rounder
        fraction = x - (rounded - rounder)
        return _polynomial(fraction, coefficients) * _exponent_from_low_bits(rounded)

    return implementation


def log1p(x: Any) -> Any:
    """Return log(1 + x) for 0 ≤ x ≤ 1 in a kernel, accurate for tiny x: 2·artanh(x / (x + 2))."""
    raise NotImplementedError("only inside a numba kernel")


@overload(log1p)  # type: ignore[untyped-decorator]
def _log1p(x: Any) -> Callable[[Any], Any]:
    coefficients = _TWICE_ARTANH[x.dtype]

    def implementation(x: Any) -> Any:
        s = x / (x + 2.0)
        return s * _polynomial(s * s, coefficients)

    return implementation
