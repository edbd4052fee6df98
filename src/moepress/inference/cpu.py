"""Products with packed matrices on a CPU, compiled by numba; `quantization/packing.py` is the plain torch twin.

For few tokens a row of the result comes straight from the packed words, which are a fraction of the 16-bit bytes:

    y_r = sum_g s_rg sum_(i in g) (q_ri - z_rg / 4) x_i.

For many tokens a matrix is unpacked once, `w_ri = s_rg (q_ri - z_rg / 4)` to the bit as the twin has it, for torch's product.
Rows go in blocks to the threads of torch's own OpenMP pool, each thread taking the next block when it has done one: a second
pool of threads would fight with torch's, which spin for milliseconds after each of its operations.

Importing this module compiles it, or reads what was compiled before (numba's cache: `__pycache__`, NUMBA_CACHE_DIR). The cache
asks whether this file has changed and no other, so all of the kernels is in it.

Legend: N slots, each a row of the input for one expert; E experts, O output rows, I input columns, G groups of a matrix.
"""

import ctypes
from array import array

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from moepress.inference.packed import COMPILED, LANES
from moepress.quantization.size import ZERO_STEPS, fields, zero_width

BLOCK = 16
"""Rows that a thread takes at a time: a few KiB of codes, which stay in its cache for all slots."""
ALONE = 1 << 19
"""Weights up to which one thread computes alone: some fifty microseconds, about what waking a sleeping thread takes."""

# Sixteen lanes at a time, which LLVM's own vectorizer does not make of packed codes: each of these is a few instructions on
# `<16 x float>`, which LLVM cuts to what the processor has (AVX-512, AVX2, NEON).

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
def load_codes(_, stream, high, high_width, low, low_width):
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


# The kernels.

_SHARED = ("taken", "rows", "columns", "group_size", "num_experts", "bits", "code_starts", "zero_starts", "codes", "zeros")
_SHARED += ("scales", "out")
MULTIPLY = np.dtype([(name, np.int64) for name in (*_SHARED, "x", "experts", "num_slots", "slots_per_row")])
UNPACK = np.dtype([(name, np.int64) for name in (*_SHARED, "expert", "is_bfloat16")])
"""What a kernel is told, in this order: numbers, and addresses of arrays. taken: rows that threads have taken so far."""


@njit
def _matrix(job, e):
    """Width, codes, zero points and scales of matrix e."""
    E, G = job.num_experts, job.rows * job.columns // job.group_size
    codes = job.codes + carray(pointer(job.code_starts), E, np.int64)[e]
    zeros = job.zeros + carray(pointer(job.zero_starts), E, np.int64)[e]
    return (
        carray(pointer(job.bits), E, np.int64)[e],
        carray(pointer(codes), job.rows * job.columns, np.uint8),
        carray(pointer(zeros), 2 * G, np.uint8),
        carray(pointer(job.scales + 2 * e * G), G, np.uint16),
    )


def _reader(width: int):
    """For matrices of this width: functions that give codes i to i + 15 of `count`, and zero point g of `count` in steps of
    the codes."""
    high, low = (*fields(width), 0)[:2]
    zero_high, zero_low = (*fields(zero_width(width)), 0)[:2]

    @njit
    def read_codes(codes, count, i):
        return load_codes(codes, i * high >> 3, high, (count * high + 7 >> 3) + (i * low >> 3), low)

    @njit
    def read_zero(zeros, count, g):
        steps = np.int64(zeros[g * zero_high >> 3]) >> (g * zero_high & 7) & (1 << zero_high) - 1
        if zero_low:
            below = np.int64(zeros[(count * zero_high + 7 >> 3) + (g * zero_low >> 3)]) >> (g * zero_low & 7)
            steps = steps << zero_low | below & (1 << zero_low) - 1
        return splat(np.float32(steps) / np.float32(ZERO_STEPS))

    return read_codes, read_zero


def _multiply_rows(width: int):
    read_codes, read_zero = _reader(width)

    @njit
    def multiply_rows(job, first, last, codes, zeros, scales, x, y):
        """`y[first:last]` of one matrix times x."""
        size, count, groups = job.group_size, job.rows * job.columns, job.columns // job.group_size
        for r in range(first, last):
            row = splat(np.float32(0))
            for g in range(groups):
                z, part = read_zero(zeros, count // size, r * groups + g), splat(np.float32(0))
                for i in range(g * size, (g + 1) * size, LANES):
                    q = read_codes(codes, count, r * job.columns + i)
                    part = multiply_add(subtract(q, z), load(x, i), part)
                row = multiply_add(splat(from_half(scales[r * groups + g])), part, row)
            y[r] = total(row)

    return multiply_rows


def _unpack_rows(width: int):
    read_codes, read_zero = _reader(width)

    @njit
    def unpack_rows(job, first, last, codes, zeros, scales, out, out_bfloat16):
        """Rows `first` to `last` of one matrix, row-major, into the array of the dtype that is wanted."""
        size, count, groups = job.group_size, job.rows * job.columns, job.columns // job.group_size
        for g in range(first * groups, last * groups):
            z, s = read_zero(zeros, count // size, g), splat(from_half(scales[g]))
            for i in range(g * size, (g + 1) * size, LANES):
                w = multiply(s, subtract(read_codes(codes, count, i), z))
                if job.is_bfloat16:
                    store_bfloat16(out_bfloat16, i, w)
                else:
                    store(out, i, w)

    return unpack_rows


_multiply_1, _multiply_2, _multiply_3, _multiply_4, _multiply_8 = (_multiply_rows(width) for width in COMPILED)
_unpack_1, _unpack_2, _unpack_3, _unpack_4, _unpack_8 = (_unpack_rows(width) for width in COMPILED)


@cfunc(types.void(types.CPointer(from_dtype(MULTIPLY))), cache=True)
def _multiply(told):
    job = carray(told, 1)[0]
    experts = carray(pointer(job.experts), job.num_slots, np.int64)
    x_TI = carray(pointer(job.x), (job.num_slots // job.slots_per_row, job.columns), np.float32)
    y_NO = carray(pointer(job.out), (job.num_slots, job.rows), np.float32)
    while True:
        first = fetch_add(told, BLOCK)
        if first >= job.rows:
            break
        last = min(first + BLOCK, job.rows)
        for n in range(job.num_slots):
            x, y = x_TI[n // job.slots_per_row], y_NO[n]
            if experts[n] >= job.num_experts:
                y[first:last] = 0
                continue
            width, codes, zeros, scales = _matrix(job, experts[n])
            if width == 1:
                _multiply_1(job, first, last, codes, zeros, scales, x, y)
            elif width == 2:
                _multiply_2(job, first, last, codes, zeros, scales, x, y)
            elif width == 3:
                _multiply_3(job, first, last, codes, zeros, scales, x, y)
            elif width == 4:
                _multiply_4(job, first, last, codes, zeros, scales, x, y)
            else:
                _multiply_8(job, first, last, codes, zeros, scales, x, y)


@cfunc(types.void(types.CPointer(from_dtype(UNPACK))), cache=True)
def _unpack(told):
    job = carray(told, 1)[0]
    width, codes, zeros, scales = _matrix(job, job.expert)
    out = carray(pointer(job.out), job.rows * job.columns, np.float32)
    out_bfloat16 = carray(pointer(job.out), job.rows * job.columns, np.uint16)
    while True:
        first = fetch_add(told, BLOCK)
        if first >= job.rows:
            break
        last = min(first + BLOCK, job.rows)
        if width == 1:
            _unpack_1(job, first, last, codes, zeros, scales, out, out_bfloat16)
        elif width == 2:
            _unpack_2(job, first, last, codes, zeros, scales, out, out_bfloat16)
        elif width == 3:
            _unpack_3(job, first, last, codes, zeros, scales, out, out_bfloat16)
        elif width == 4:
            _unpack_4(job, first, last, codes, zeros, scales, out, out_bfloat16)
        else:
            _unpack_8(job, first, last, codes, zeros, scales, out, out_bfloat16)


_in_each_thread = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
"""OpenMP's entry in the library that torch brought: runs `(function, argument)` once in each of so many threads of its pool."""
if _in_each_thread is not None:
    _in_each_thread.argtypes, _in_each_thread.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None


def _run(kernel, work: int, packed, *told: int) -> None:
    places, E = packed.places.data_ptr(), len(packed.bits)
    matrices = (packed.rows, packed.columns, packed.group_size, E, places, places + 8 * E, places + 16 * E)
    job = array("q", (0, *matrices, packed.codes.data_ptr(), packed.zeros.data_ptr(), packed.scales.data_ptr(), *told))
    threads = torch.get_num_threads() if work > ALONE else 1
    if threads > 1 and _in_each_thread is not None:
        _in_each_thread(kernel.address, job.buffer_info()[0], threads, 0)
    else:
        kernel.ctypes(job.buffer_info()[0])


def matrix(packed, e: int, dtype: torch.dtype) -> torch.Tensor:
    """Matrix e of a `PackedMatrices`, `[O, I]`, unpacked to the same bits as by torch."""
    kept = dtype if dtype == torch.bfloat16 else torch.float32
    out_OI = torch.empty(packed.rows, packed.columns, dtype=kept)
    _run(_unpack, out_OI.numel(), packed, out_OI.data_ptr(), e, kept == torch.bfloat16)
    return out_OI.to(dtype)


def products(packed, x_TI: torch.Tensor, experts_N: torch.Tensor) -> torch.Tensor:
    """Float32 `[N, O]`: slot n is matrix `experts[n]` of a `PackedMatrices` times row `n // (N / T)` of x; zeros where there is
    no such matrix, at no cost."""
    x_TI, experts_N = x_TI.float().contiguous(), experts_N.long().contiguous()
    N, T = len(experts_N), len(x_TI)
    y_NO = torch.empty(N, packed.rows)
    work = N * packed.rows * packed.columns
    _run(_multiply, work, packed, y_NO.data_ptr(), x_TI.data_ptr(), experts_N.data_ptr(), N, N // T)
    return y_NO
