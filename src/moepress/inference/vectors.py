"""Sixteen lanes at a time in numba: what LLVM's own vectorizer does not make of packed codes, said outright.

Every function here is a few LLVM instructions on `<16 x float>`; LLVM cuts them to what the processor has (AVX-512, AVX2,
NEON).
numba's cache looks at the age of the kernels' own file: after a change here, touch `cpu.py`.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16
_F32, _I32 = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


class Lanes(types.Type):
    """The type of a vector of sixteen float32."""

    def __init__(self):
        super().__init__("Lanes")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _FLOATS)


def _address(context, builder, array_type, array, index, target):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), target.as_pointer())


def _spread(builder, scalar, kind):
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


@intrinsic
def splat(_, value):
    """The same float32 in every lane."""

    def build(context, builder, signature, args):
        return _spread(builder, args[0], _FLOATS)

    return lanes(types.float32), build


@intrinsic
def load(_, array, index):
    """Lanes `array[index : index + 16]` of float32."""

    def build(context, builder, signature, args):
        return builder.load(_address(context, builder, signature.args[0], *args, _FLOATS), align=4)

    return lanes(array, types.int64), build


@intrinsic
def store(_, array, index, value):
    """`array[index : index + 16] = value` of float32."""

    def build(context, builder, signature, args):
        array, index, value = args
        builder.store(value, _address(context, builder, signature.args[0], array, index, _FLOATS), align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64, lanes), build


@intrinsic
def store_bfloat16(_, array, index, value):
    """The same for bfloat16 in an array of uint16; rounded to nearest, ties to even, as torch rounds finite numbers."""

    def build(context, builder, signature, args):
        array, index, value = args
        bits = builder.bitcast(value, _INTS)
        half = builder.lshr(bits, ir.Constant(_INTS, [16] * LANES))
        is_odd = builder.and_(half, ir.Constant(_INTS, [1] * LANES))
        rounded = builder.add(builder.add(bits, ir.Constant(_INTS, [0x7FFF] * LANES)), is_odd)
        kind = ir.VectorType(ir.IntType(16), LANES)
        found = builder.trunc(builder.lshr(rounded, ir.Constant(_INTS, [16] * LANES)), kind)
        builder.store(found, _address(context, builder, signature.args[0], array, index, kind), align=2)
        return context.get_dummy_value()

    return types.void(array, types.int64, lanes), build


def _fields(context, builder, array_type, array, index, field):
    """Sixteen fields of `field` bits that begin at a byte, as `<16 x i32>`: lane j's begins at bit j * field."""
    words = max(1, LANES * field // 32)
    bits = ir.IntType(min(32, LANES * field))
    kind = ir.VectorType(bits, words)
    loaded = builder.load(_address(context, builder, array_type, array, index, kind), align=1)
    if bits.width < 32:
        loaded = builder.zext(loaded, ir.VectorType(_I32, words))
    places = [divmod(j * field, 32) for j in range(LANES)]
    undefined = ir.Constant(loaded.type, ir.Undefined)
    each = builder.shuffle_vector(loaded, undefined, ir.Constant(_INTS, [word for word, _ in places]))
    shifted = builder.lshr(each, ir.Constant(_INTS, [shift for _, shift in places]))
    return builder.and_(shifted, ir.Constant(_INTS, [(1 << field) - 1] * LANES))


@intrinsic
def codes(_, stream, high, high_width, low, low_width):
    """Sixteen codes as float32: fields of `high_width` bits from the byte `high` on and, unless `low_width` is 0, below them
    fields of `low_width` bits from the byte `low` on. The widths are constants."""
    if not isinstance(high_width, types.Literal) or not isinstance(low_width, types.Literal):
        return None
    wide, narrow = high_width.literal_value, low_width.literal_value

    def build(context, builder, signature, args):
        kind = signature.args[0]
        found = _fields(context, builder, kind, args[0], args[1], wide)
        if narrow:
            below = _fields(context, builder, kind, args[0], args[3], narrow)
            found = builder.or_(builder.shl(found, ir.Constant(_INTS, [narrow] * LANES)), below)
        return builder.sitofp(found, _FLOATS)

    return lanes(stream, types.int64, high_width, types.int64, low_width), build


@intrinsic
def subtract(_, a, b):
    return lanes(lanes, lanes), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def multiply(_, a, b):
    return lanes(lanes, lanes), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def multiply_add(_, a, b, c):
    """`a * b + c`, rounded once."""

    def build(context, builder, signature, args):
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        return builder.call(fma, args)

    return lanes(lanes, lanes, lanes), build


@intrinsic
def total(_, a):
    """The sum over the lanes, by halves."""

    def build(context, builder, signature, args):
        (value,) = args
        for half in (8, 4, 2, 1):
            undefined = ir.Constant(value.type, ir.Undefined)
            kind = ir.VectorType(_I32, half)
            low = builder.shuffle_vector(value, undefined, ir.Constant(kind, list(range(half))))
            high = builder.shuffle_vector(value, undefined, ir.Constant(kind, list(range(half, 2 * half))))
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(_I32, 0))

    return types.float32(lanes), build


@intrinsic
def from_half(_, bits):
    """The float32 of a float16 that is given as uint16."""

    def build(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _F32)

    return types.float32(types.uint16), build


@intrinsic
def pointer(_, address):
    """An address as what `carray` takes."""

    def build(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


@intrinsic
def fetch_add(_, pointer, amount):
    """The int64 that a pointer leads to, which grows by `amount` in one step with it, whoever else does the same."""

    def build(context, builder, signature, args):
        place = builder.bitcast(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, args[1], "monotonic")

    return types.int64(pointer, types.int64), build
