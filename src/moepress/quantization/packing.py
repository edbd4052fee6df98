"""Codes of any width in exactly their bits, and how many bytes that takes.

A width is the sum of its binary digits' powers of two (3 = 2 + 1, 5 = 4 + 1, 10 = 8 + 2): each power is a stream of fields
that never cross a byte, the first in a byte's lowest bits. The widest stream comes first and holds the codes' highest bits.
Unpacking one field is a shift and a mask.
Widths 1, 2, 4 and 8 are one stream; the zero points, in quarter steps, take two bits more than their codes.

Legend: E experts, O output rows, I input columns, G groups of a row.
"""

from dataclasses import dataclass

import torch

from moepress.quantization.size import ZERO_STEPS, fields, zero_width


def pack(codes: torch.Tensor, width: int) -> torch.Tensor:
    """uint8 stream `[packed_bytes(codes.numel(), width)]` of integer codes below `2 ** width`, in row-major order."""
    flat = codes.reshape(-1).to(torch.int32)
    assert flat.numel() == 0 or (int(flat.min()) >= 0 and int(flat.max()) < 1 << width), "codes exceed their width"
    streams, shift = [], 0
    for field in sorted(fields(width)):
        per_byte = 8 // field
        part = (flat >> shift) & ((1 << field) - 1)
        part = torch.nn.functional.pad(part, (0, -part.numel() % per_byte)).view(-1, per_byte)
        places = field * torch.arange(per_byte, dtype=torch.int32, device=codes.device)
        streams.append((part << places).sum(1).to(torch.uint8))
        shift += field
    return torch.cat(streams[::-1])


def unpack(stream: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """The inverse of `pack`: codes `[count]`, uint8 up to 8 bits, int16 above."""
    dtype = torch.uint8 if width <= 8 else torch.int16
    codes, start, shift = None, 0, width
    for field in fields(width):
        shift -= field
        size = -(-count * field // 8)
        part = stream[start : start + size]
        start += size
        if field < 8:
            places = torch.arange(0, 8, field, dtype=torch.uint8, device=stream.device)
            part = ((part[:, None] >> places) & ((1 << field) - 1)).view(-1)[:count]
        part = part.to(dtype) << shift
        codes = part if codes is None else codes | part
    assert codes is not None  # every width has a field
    return codes


@dataclass
class Quantized:
    """A batch of quantized matrices: `w = scales * (codes - zeros / ZERO_STEPS)`, one scale and zero a group.

    codes: uint8 `[E, O, I]`. scales: float16 `[E, O, G]`. zeros: int16 `[E, O, G]`. bits: E widths.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bits: list[int]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """`[E, O, I]`; computed as inference does it, so that both see the same weights to the bit."""
        return dequantize(self.codes, self.scales, self.zeros, dtype)

    def matrix(self, e: int) -> torch.Tensor:
        """Matrix e `[O, I]` dequantized, float32."""
        return dequantize(self.codes[e], self.scales[e], self.zeros[e], torch.float32)

    def pack(self) -> dict[str, torch.Tensor]:
        """`codes` and `zeros`: uint8 streams, expert after expert; `scales`: float16 `[E, O, G]`."""
        return {
            "codes": torch.cat([pack(codes, b) for codes, b in zip(self.codes, self.bits, strict=True)]),
            "zeros": torch.cat([pack(zeros, zero_width(b)) for zeros, b in zip(self.zeros, self.bits, strict=True)]),
            "scales": self.scales,
        }


def dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`scales * (codes - zeros / ZERO_STEPS)` in float32, then `dtype`. codes `[..., O, I]`, scales and zeros `[..., O, G]`."""
    grouped = codes.unflatten(-1, (scales.shape[-1], -1)).float()
    grouped -= zeros.float().unsqueeze(-1) / ZERO_STEPS
    grouped *= scales.float().unsqueeze(-1)
    return grouped.flatten(-2).to(dtype)
