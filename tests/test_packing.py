"""The packed format: codes take exactly their bits and come back; what is dequantized is what was searched."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.quantization import size
from moepress.quantization.packing import Quantized, pack, unpack


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 15), st.integers(0, 70), st.integers(0, 2**31))
def test_pack_round_trip(width, count, seed):
    codes = torch.randint(0, 1 << width, (count,), generator=torch.Generator().manual_seed(seed))
    stream = pack(codes, width)
    assert stream.dtype == torch.uint8 and len(stream) == size.packed_bytes(count, width)
    found = unpack(stream, count, width)
    assert torch.equal(found.long(), codes) and found.dtype == (torch.uint8 if width <= 8 else torch.int16)


def test_three_bits_are_three_bits():
    assert size.packed_bytes(8 * 1000, 3) == 3000
    assert [size.fields(w) for w in (1, 2, 3, 4, 6, 10)] == [[1], [2], [2, 1], [4], [4, 2], [8, 2]]


def test_packing_by_hand():
    """Two-bit codes lie lowest first in a byte; three bits are a two-bit stream (the high part), then a one-bit stream."""
    assert pack(torch.tensor([1, 2, 3, 0]), 2).tolist() == [0b00_11_10_01]
    assert pack(torch.tensor([5, 2, 7, 0, 1, 0, 0, 4]), 3).tolist() == [0b00_11_01_10, 0b10_00_00_00, 0b00010101]


def test_matrix_bytes_are_what_is_written():
    generator = torch.Generator().manual_seed(0)
    for bits in (1, 2, 3, 4, 8):
        codes = torch.randint(0, 1 << bits, (1, 6, 64), generator=generator).to(torch.uint8)
        zeros = torch.randint(0, 4 * ((1 << bits) - 1) + 1, (1, 6, 2), generator=generator).to(torch.int16)
        scales = torch.rand(1, 6, 2, generator=generator).half()
        packed = Quantized(codes, scales, zeros, [bits]).pack()
        assert sum(t.numel() * t.element_size() for t in packed.values()) == size.matrix_bytes(6, 64, bits, 32)


def test_dequantize_is_its_equation():
    codes = torch.tensor([[[0, 1, 2, 3]]], dtype=torch.uint8)
    quantized = Quantized(codes, torch.tensor([[[0.5, 2.0]]]).half(), torch.tensor([[[3, 4]]], dtype=torch.int16), [2])
    expected = [[0.5 * (0 - 0.75), 0.5 * (1 - 0.75), 2.0 * (2 - 1), 2.0 * (3 - 1)]]
    assert quantized.dequantize().tolist() == [expected] and quantized.matrix(0).tolist() == expected
