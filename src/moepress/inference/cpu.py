"""Products with packed matrices on a CPU, compiled by numba; `quantization/packing.py` is the plain torch twin.

For few tokens a row of the result comes straight from the packed words, which are a fraction of the 16-bit bytes:

    y_r = sum_g s_rg sum_(i in g) (q_ri - z_rg / 4) x_i.

For many tokens a matrix is unpacked once, `w_ri = s_rg (q_ri - z_rg / 4)` to the bit as the twin has it, for torch's product.
Rows go in blocks to the threads of torch's own OpenMP pool, each thread taking the next block when it has done one: a second
pool of threads would fight with torch's, which spin for milliseconds after each of its operations.

Importing this module compiles it, or reads what was compiled before (numba's cache: `__pycache__`, NUMBA_CACHE_DIR).

Legend: N slots, each a row of the input for one expert; E experts, O output rows, I input columns, G groups of a matrix.
"""

import ctypes
from array import array

import numpy as np
import torch
from numba import carray, cfunc, from_dtype, njit, types

from moepress.inference import vectors as v
from moepress.quantization.size import ZERO_STEPS, fields, zero_width

WIDTHS = (1, 2, 3, 4, 8)
BLOCK = 16
"""Rows that a thread takes at a time: a few KiB of codes, which stay in its cache for all slots."""
ALONE = 1 << 19
"""Weights up to which one thread computes alone: some fifty microseconds, about what waking a sleeping thread takes."""
_SHARED = ("taken", "rows", "columns", "group_size", "num_experts", "bits", "code_starts", "zero_starts", "codes", "zeros")
_SHARED += ("scales", "out")
MULTIPLY = np.dtype([(name, np.int64) for name in (*_SHARED, "x", "experts", "num_slots", "slots_per_row")])
UNPACK = np.dtype([(name, np.int64) for name in (*_SHARED, "expert", "is_bfloat16")])
"""What a kernel is told, in this order: numbers, and addresses of arrays. taken: rows that threads have taken so far."""


@njit
def _matrix(job, e):
    """Width, codes, zero points and scales of matrix e."""
    E, G = job.num_experts, job.rows * job.columns // job.group_size
    codes = job.codes + carray(v.pointer(job.code_starts), E, np.int64)[e]
    zeros = job.zeros + carray(v.pointer(job.zero_starts), E, np.int64)[e]
    return (
        carray(v.pointer(job.bits), E, np.int64)[e],
        carray(v.pointer(codes), job.rows * job.columns, np.uint8),
        carray(v.pointer(zeros), 2 * G, np.uint8),
        carray(v.pointer(job.scales + 2 * e * G), G, np.uint16),
    )


def _reader(width: int):
    """For matrices of this width: functions that give codes i to i + 15 of `count`, and zero point g of `count` in steps of
    the codes."""
    high, low = (*fields(width), 0)[:2]
    zero_high, zero_low = (*fields(zero_width(width)), 0)[:2]

    @njit
    def read_codes(codes, count, i):
        return v.codes(codes, i * high >> 3, high, (count * high + 7 >> 3) + (i * low >> 3), low)

    @njit
    def read_zero(zeros, count, g):
        steps = np.int64(zeros[g * zero_high >> 3]) >> (g * zero_high & 7) & (1 << zero_high) - 1
        if zero_low:
            below = np.int64(zeros[(count * zero_high + 7 >> 3) + (g * zero_low >> 3)]) >> (g * zero_low & 7)
            steps = steps << zero_low | below & (1 << zero_low) - 1
        return v.splat(np.float32(steps) / np.float32(ZERO_STEPS))

    return read_codes, read_zero


def _multiply_rows(width: int):
    read_codes, read_zero = _reader(width)

    @njit
    def multiply_rows(job, first, last, codes, zeros, scales, x, y):
        """`y[first:last]` of one matrix times x."""
        size, count, groups = job.group_size, job.rows * job.columns, job.columns // job.group_size
        for r in range(first, last):
            row = v.splat(np.float32(0))
            for g in range(groups):
                z, part = read_zero(zeros, count // size, r * groups + g), v.splat(np.float32(0))
                for i in range(g * size, (g + 1) * size, v.LANES):
                    q = read_codes(codes, count, r * job.columns + i)
                    part = v.multiply_add(v.subtract(q, z), v.load(x, i), part)
                row = v.multiply_add(v.splat(v.from_half(scales[r * groups + g])), part, row)
            y[r] = v.total(row)

    return multiply_rows


def _unpack_rows(width: int):
    read_codes, read_zero = _reader(width)

    @njit
    def unpack_rows(job, first, last, codes, zeros, scales, out, out_bfloat16):
        """Rows `first` to `last` of one matrix, row-major, into the array of the dtype that is wanted."""
        size, count, groups = job.group_size, job.rows * job.columns, job.columns // job.group_size
        for g in range(first * groups, last * groups):
            z, s = read_zero(zeros, count // size, g), v.splat(v.from_half(scales[g]))
            for i in range(g * size, (g + 1) * size, v.LANES):
                w = v.multiply(s, v.subtract(read_codes(codes, count, i), z))
                if job.is_bfloat16:
                    v.store_bfloat16(out_bfloat16, i, w)
                else:
                    v.store(out, i, w)

    return unpack_rows


_multiply_1, _multiply_2, _multiply_3, _multiply_4, _multiply_8 = (_multiply_rows(width) for width in WIDTHS)
_unpack_1, _unpack_2, _unpack_3, _unpack_4, _unpack_8 = (_unpack_rows(width) for width in WIDTHS)


@cfunc(types.void(types.CPointer(from_dtype(MULTIPLY))), cache=True)
def _multiply(told):
    job = carray(told, 1)[0]
    experts = carray(v.pointer(job.experts), job.num_slots, np.int64)
    x_TI = carray(v.pointer(job.x), (job.num_slots // job.slots_per_row, job.columns), np.float32)
    y_NO = carray(v.pointer(job.out), (job.num_slots, job.rows), np.float32)
    while True:
        first = v.fetch_add(told, BLOCK)
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
    out = carray(v.pointer(job.out), job.rows * job.columns, np.float32)
    out_bfloat16 = carray(v.pointer(job.out), job.rows * job.columns, np.uint16)
    while True:
        first = v.fetch_add(told, BLOCK)
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
    x_TI, experts_N = x_TI.float().contiguous(), experts_N.contiguous()
    N, T = len(experts_N), len(x_TI)
    y_NO = torch.empty(N, packed.rows)
    work = N * packed.rows * packed.columns
    _run(_multiply, work, packed, y_NO.data_ptr(), x_TI.data_ptr(), experts_N.data_ptr(), N, N // T)
    return y_NO
