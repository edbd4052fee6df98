"""Triton kernels over packed matrices: what runs on the device; `launch.py` calls them.

The unit of everything is the **chunk**: 8 codes of a row that lie side by side. At every width a chunk is whole bytes: one load
of 8, 16, 32 or 64 bits at 1, 2, 4 and 8 bits; at 3 bits one of 16 from the two-bit stream, which holds the codes' high
bits, and one of 8 from the one-bit stream behind it. Code j of all chunks of a tile is **plane** j: all chunks shifted alike
and masked, so unpacking moves no weight between threads. For that the inputs are laid out once in the planes' order
(`layout.planes`). A tile has up to 16 chunks a row, so many that it lies in one group: a row has one scale and zero there.

A code becomes a number without a conversion: at the top of a float32's mantissa, under the exponent of 1, it reads
`v = 1 + code / 2**bits`. So `scale * (code - zero / 4) = a * v + t` with `a = scale * 2**bits` and
`t = -scale * (2**bits + zero / 4)`. Scales have 11 significant bits, codes and zeros at most 10: each of these products and
sums is exact in float32, and the weights are to the bit those that `packing.dequantize` gives.

Kernels are deterministic: no atomics; parts of a sum and a token's experts are added in a fixed order. Where a layer has
several widths, a program branches on its expert's: one launch for all, as at decode launches cost more than a branch that
all threads of a program take alike, and as all experts' programs then fill the device together.

Legend: T tokens, K selected experts, S = T * K slots (slot s is choice s % K of token s // K), E experts, R rows of the matrix
and B slots of a program.
"""

import triton
import triton.language as tl

from moepress.inference.kernels import is_interpreted, layout


def _constant(value: int):
    """A global that kernels read: the compiler wants `tl.constexpr`, with which the interpreter's plain numbers do not mix."""
    return value if is_interpreted() else tl.constexpr(value)


CHUNK, ALIGN = map(_constant, (layout.CHUNK, layout.ALIGN))
SILU, CLAMPED = map(_constant, (layout.SILU, layout.CLAMPED))
DENSE, LEADER = map(_constant, (layout.DENSE, layout.LEADER))


@triton.jit
def _chunks(codes_ptr, index, mask, NUMEL: tl.constexpr, BITS: tl.constexpr):
    """`(field, low)` of chunks: the only or the two-bit field of their codes, and at 3 bits the one-bit field below it."""
    if BITS == 1:
        return tl.load(codes_ptr + index, mask, 0).to(tl.int32), 0
    elif BITS == 2:
        return tl.load(codes_ptr.to(tl.pointer_type(tl.int16)) + index, mask, 0).to(tl.int32), 0
    elif BITS == 3:
        high = tl.load(codes_ptr.to(tl.pointer_type(tl.int16)) + index, mask, 0).to(tl.int32)
        return high, tl.load(codes_ptr + NUMEL // 4 + index, mask, 0).to(tl.int32)
    elif BITS == 4:
        return tl.load(codes_ptr.to(tl.pointer_type(tl.int32)) + index, mask, 0), 0
    else:
        return tl.load(codes_ptr.to(tl.pointer_type(tl.int64)) + index, mask, 0), 0


@triton.jit
def _moved(field, FROM: tl.constexpr, TO: tl.constexpr, WIDTH: tl.constexpr):
    """Bits FROM .. FROM + WIDTH of an integer at TO, all others 0."""
    if FROM > TO:
        field = field >> (FROM - TO)
    elif FROM < TO:
        field = field << (TO - FROM)
    return field & (((1 << WIDTH) - 1) << TO)


@triton.jit
def _values(field, low, j: tl.constexpr, BITS: tl.constexpr):
    """Plane j of chunks: `1 + code / 2**BITS`, float32; the mantissa's 23 bits hold the code at their top."""
    if BITS == 3:
        bits = _moved(low, j, 20, 1) | (_moved(field, 2 * j, 21, 2) | 0x3F800000)
    elif BITS == 8:
        bits = _moved((field >> (8 * j)).to(tl.int32), 0, 15, 8) | 0x3F800000
    else:
        bits = _moved(field, BITS * j, 23 - BITS, BITS) | 0x3F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _pair(field, low, a, t, j: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """`[R, PLANE, 2]`: the weights of planes j and j + 4."""
    below, above = _values(field, low, j, BITS), _values(field, low, j + 4, BITS)
    return tl.join((a * below + t).to(DTYPE), (a * above + t).to(DTYPE))


@triton.jit
def _field(stream_ptr, n, mask, FIELD: tl.constexpr):
    """Field n of a stream of fields that cross no byte, the first in a byte's lowest bits."""
    byte = tl.load(stream_ptr + (n * FIELD) // 8, mask, 0).to(tl.int32)
    return (byte >> ((n * FIELD) % 8)) & ((1 << FIELD) - 1)


@triton.jit
def _affine(zeros_ptr, scales_ptr, n, mask, COUNT: tl.constexpr, BITS: tl.constexpr):
    """`(a, t)` of groups n of a matrix with COUNT of them. Zeros have BITS + 2 bits: one field, or two in two streams."""
    HIGH: tl.constexpr = 2 if BITS == 1 else (8 if BITS == 8 else 4)
    LOW: tl.constexpr = BITS + 2 - HIGH
    zero = _field(zeros_ptr, n, mask, HIGH)
    if LOW > 0:
        zero = (zero << LOW) | _field(zeros_ptr + (COUNT * HIGH + 7) // 8, n, mask, LOW)
    scale = tl.load(scales_ptr + n, mask, 0).to(tl.float32)
    return scale * (1 << BITS), -scale * ((1 << BITS) + 0.25 * zero.to(tl.float32))


@triton.jit
def _one(
    x_ptr, codes_ptr, zeros_ptr, scales_ptr, row, row_mask, start, stop,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, PLANE: tl.constexpr, AT_ONCE: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """`[R]`: rows of a matrix times one input, over tiles start .. stop, AT_ONCE together, on the ordinary cores.

    In a chunk all weights share `a` and `t`, so they enter once for a chunk: `a * sum_j v_j x_j + t * sum_j x_j`.
    """
    GROUPS: tl.constexpr = COLUMNS // GROUP
    R: tl.constexpr = row.shape[0]
    w = tl.arange(0, PLANE)
    total = tl.zeros([R, AT_ONCE, PLANE], tl.float32)
    for first in range(start, stop, AT_ONCE):
        tile = first + tl.arange(0, AT_ONCE)
        there = tile < stop
        c = row[:, None, None] * (COLUMNS // CHUNK) + tile[None, :, None] * PLANE + w[None, None, :]
        mask = row_mask[:, None, None] & there[None, :, None]
        field, low = _chunks(codes_ptr, c, mask, ROWS * COLUMNS, BITS)
        x_at = x_ptr + tile[:, None] * (CHUNK * PLANE) + w[None, :]
        inputs = tl.load(x_at, there[:, None], 0).to(tl.float32)
        products = _values(field, low, 0, BITS) * inputs[None, :, :]
        for j in tl.static_range(1, CHUNK):
            x = tl.load(x_at + j * PLANE, there[:, None], 0).to(tl.float32)
            products += _values(field, low, j, BITS) * x[None, :, :]
            inputs += x
        n = row[:, None] * GROUPS + (tile * (CHUNK * PLANE) // GROUP)[None, :]
        a, t = _affine(zeros_ptr, scales_ptr, n, row_mask[:, None] & there[None, :], ROWS * GROUPS, BITS)
        total += a[:, :, None] * products + t[:, :, None] * inputs[None, :, :]
    return tl.sum(tl.sum(total, 2), 1)


@triton.jit
def _many(
    x_ptr, x_row, x_mask, x_stride, codes_ptr, zeros_ptr, scales_ptr, row, row_mask, start, stop,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, PLANE: tl.constexpr, BITS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """`[R, B]`: rows of a matrix times B inputs, over tiles start .. stop, on the tensor cores.

    The weights are the left factor, which Hopper's tensor cores take from registers, where they are unpacked.
    """
    GROUPS: tl.constexpr = COLUMNS // GROUP
    TILE: tl.constexpr = CHUNK * PLANE
    R: tl.constexpr = row.shape[0]
    w, k = tl.arange(0, PLANE), tl.arange(0, TILE)
    x_at = x_ptr + x_row[None, :].to(tl.int64) * x_stride + k[:, None]
    total = tl.zeros([R, x_row.shape[0]], tl.float32)
    for tile in range(start, stop):
        c = row[:, None] * (COLUMNS // CHUNK) + tile * PLANE + w[None, :]
        field, low = _chunks(codes_ptr, c, row_mask[:, None], ROWS * COLUMNS, BITS)
        n = row * GROUPS + tile * TILE // GROUP
        a, t = _affine(zeros_ptr, scales_ptr, n, row_mask, ROWS * GROUPS, BITS)
        a, t = a[:, None], t[:, None]
        x = tl.load(x_at + tile * TILE, x_mask[None, :], 0)
        DTYPE: tl.constexpr = x.dtype
        even = tl.join(_pair(field, low, a, t, 0, BITS, DTYPE), _pair(field, low, a, t, 2, BITS, DTYPE))
        odd = tl.join(_pair(field, low, a, t, 1, BITS, DTYPE), _pair(field, low, a, t, 3, BITS, DTYPE))
        joined = tl.join(even, odd)  # [R, PLANE, 2, 2, 2], the plane's number in binary
        weights = tl.reshape(tl.trans(joined, 0, 2, 3, 4, 1), [R, TILE])
        if WIDEN:  # the same numbers: products of bfloat16 are exact in float32
            weights, x = weights.to(tl.float32), x.to(tl.float32)
        total = tl.dot(weights, x, total, input_precision="ieee")
    return total


@triton.jit
def _product(
    x_ptr, x_row, x_mask, x_stride, codes_ptr, zeros_ptr, scales_ptr, table_ptr, e, row, row_mask, split,
    SPLITS: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    PLANE: tl.constexpr, AT_ONCE: tl.constexpr, BITS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Part `split` of SPLITS of matrix e's rows times the inputs, its width being BITS: `[R, B]`."""
    scales_ptr += e * (ROWS * (COLUMNS // GROUP))
    codes_ptr += tl.load(table_ptr + e) * ALIGN
    zeros_ptr += tl.load(table_ptr + E + e)
    TILES: tl.constexpr = COLUMNS // (CHUNK * PLANE)
    PART: tl.constexpr = (TILES + SPLITS - 1) // SPLITS
    start = split * PART
    stop = tl.minimum(start + PART, TILES)
    if x_row.shape[0] == 1:
        x_ptr += tl.sum(x_row, 0).to(tl.int64) * x_stride
        found = _one(
            x_ptr, codes_ptr, zeros_ptr, scales_ptr, row, row_mask, start, stop, ROWS, COLUMNS, GROUP, PLANE, AT_ONCE, BITS
        )[:, None]
    else:
        found = _many(
            x_ptr, x_row, x_mask, x_stride, codes_ptr, zeros_ptr, scales_ptr, row, row_mask, start, stop,
            ROWS, COLUMNS, GROUP, PLANE, BITS, WIDEN,
        )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["num_slots"])
def multiply(
    x_ptr, x_stride, y_ptr, y_stride, y_split_stride, codes_ptr, zeros_ptr, scales_ptr, table_ptr, bias_ptr,
    slots_ptr, blocks_ptr, num_slots, alpha, limit,
    FIND: tl.constexpr, JOIN: tl.constexpr, WIDTHS: tl.constexpr, HAS_BIAS: tl.constexpr, INTERLEAVED: tl.constexpr,
    E: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, X_PER_SLOT: tl.constexpr,
    PLANE: tl.constexpr, OUT_PLANE: tl.constexpr, R: tl.constexpr, B: tl.constexpr, SLOTS: tl.constexpr,
    CHOICES: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A tile of rows and slots of `y[split, slot] = join(matrix[expert of slot] @ x[...] + bias)`.

    Programs: (slot or block of slots, block of rows, part of the columns). x: `planes` of the inputs, one a token, or with
    X_PER_SLOT one a slot. y: float32 parts, or with JOIN the planes of what the next matrix takes.
    table: `[3, E]` int64, of each matrix: where its codes (in units of ALIGN bytes) and zeros start, and its width.
    slots: with LEADER the experts `[T, K]`, E for none; with SORTED the slots by expert. blocks: with SORTED `[3, blocks]`
    int32, of each its expert (E: no block), its first place in slots and the expert's last. WIDTHS: bit b is set where some
    expert has b bits.
    SLOTS, CHOICES: num_slots and K, up to a power of two.
    """
    program, block, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b = tl.arange(0, B)
    if FIND == DENSE:
        e = 0
        slot = program * B + b
        slot_mask = slot < num_slots
    elif FIND == LEADER:
        e = tl.load(slots_ptr + program).to(tl.int32)
        if e >= E:
            return
        if B == 1:
            slot, slot_mask = program + b, b == 0
        else:
            every = tl.arange(0, SLOTS)
            same = tl.load(slots_ptr + every, every < program, E).to(tl.int32) == e
            if tl.sum(same.to(tl.int32), 0) > 0:
                return
            k = tl.arange(0, CHOICES)
            at = b[:, None] * K + k[None, :]
            taken = tl.load(slots_ptr + at, (k < K)[None, :] & (at < num_slots), E).to(tl.int32) == e
            slot = b * K + tl.sum(tl.where(taken, k[None, :], 0), 1)
            slot_mask = tl.sum(taken.to(tl.int32), 1) > 0
    else:
        num_blocks = tl.num_programs(0)
        e = tl.load(blocks_ptr + program)
        if e >= E:
            return
        at = tl.load(blocks_ptr + num_blocks + program) + b
        slot_mask = at < tl.load(blocks_ptr + 2 * num_blocks + program)
        slot = tl.load(slots_ptr + at, slot_mask, 0).to(tl.int32)

    r = tl.arange(0, R)
    OUT: tl.constexpr = R // 2 if JOIN else R  # what a program puts out; gate and up alternate in its rows
    NUM_OUT: tl.constexpr = ROWS // 2 if JOIN else ROWS
    out = block * OUT + tl.arange(0, OUT)
    if JOIN:
        unit = block * OUT + r // 2
        row = unit * 2 + r % 2 if INTERLEAVED else unit + (r % 2) * NUM_OUT
        row_mask = unit < NUM_OUT
    else:
        row, row_mask = out, out < ROWS

    x_row = slot if X_PER_SLOT else slot // K
    bits = tl.load(table_ptr + 2 * E + e)
    y = tl.zeros([R, B], tl.float32)
    for width in tl.static_range(1, 9):
        if (WIDTHS >> width) & 1:  # noqa: SIM102 (the first is the compiler's question, the second the device's)
            if bits == width:
                y = _product(
                    x_ptr, x_row, slot_mask, x_stride, codes_ptr, zeros_ptr, scales_ptr, table_ptr, e, row, row_mask, split,
                    SPLITS, E, ROWS, COLUMNS, GROUP, PLANE, AT_ONCE, width, WIDEN,
                )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + e * ROWS + row, row_mask, 0).to(tl.float32)
        y += tl.where(split == 0, bias, 0.0)[:, None]
    place = out
    if JOIN:
        gate, up = tl.split(tl.trans(tl.reshape(y, [OUT, 2, B]), 0, 2, 1))
        if JOIN == SILU:
            y = gate * tl.sigmoid(gate) * up
        else:
            gate = tl.minimum(gate, limit)
            y = (tl.minimum(tl.maximum(up, -limit), limit) + 1) * gate * tl.sigmoid(alpha * gate)
        TILE: tl.constexpr = CHUNK * OUT_PLANE
        place = out // TILE * TILE + out % CHUNK * OUT_PLANE + out % TILE // CHUNK
    y_at = y_ptr + split * y_split_stride + slot[None, :].to(tl.int64) * y_stride + place[:, None]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), (out < NUM_OUT)[:, None] & slot_mask[None, :])


@triton.jit(do_not_specialize=["num_slots", "columns"])
def combine(
    parts_ptr, out_ptr, experts_ptr, weights_ptr, num_slots, columns,
    E: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out[t] = sum_k weights[t, k] * sum_split parts[split, t * K + k]` in this order; slots of "no expert" are not read."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(K):
        slot = t * K + k
        end = columns
        if WEIGHTED:
            end = tl.where(tl.load(experts_ptr + slot) < E, columns, 0)
        mask = column < end
        y = tl.zeros([BLOCK], tl.float32)
        for split in tl.static_range(SPLITS):
            y += tl.load(parts_ptr + (split * num_slots + slot) * columns + column, mask, 0)
        if WEIGHTED:
            y *= tl.load(weights_ptr + slot).to(tl.float32)
        total += y
    tl.store(out_ptr + t * columns + column, total.to(out_ptr.dtype.element_ty), column < columns)
