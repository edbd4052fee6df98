"""Checkpoints that are published in 8 or 4 bits, read as 16-bit ones, a matrix at a time.

`float8`: e4m3 codes with a scale for every block of 128 x 128 (`weight_scale_inv`, DeepSeek-V3). `mxfp4`: e2m1 codes, two to a
byte, with a power of two for every 32 (`_blocks`, `_scales`, gpt-oss; OCP Microscaling Formats 1.0).
"""

from dataclasses import dataclass
from typing import overload

import torch

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of e2m1's sixteen codes."""


@dataclass(frozen=True)
class LowBit:
    """One or more matrices `[..., rows, columns]` as stored; `to(device, dtype)` makes plain tensors of them.

    codes: float8 `[..., rows, columns]`, or uint8 `[..., rows, columns / 32, 16]`. scales: float32 for each block of the first,
    uint8 exponents for each group of the second.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int] = (128, 128)

    @property
    def is_mxfp4(self) -> bool:
        return self.codes.dtype == torch.uint8

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-2], self.codes.shape[-2] * 32)) if self.is_mxfp4 else self.codes.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> "LowBit":
        return LowBit(self.codes[index], self.scales[index], self.block)

    def is_finite(self) -> bool:
        if self.is_mxfp4:
            return bool((self.scales < 255).all())
        return bool(self.scales.isfinite().all()) and not bool((self.codes.view(torch.uint8) & 0x7F == 0x7F).any())

    @overload
    def to(self, device) -> "LowBit": ...

    @overload
    def to(self, device, dtype: torch.dtype) -> torch.Tensor: ...

    def to(self, device, dtype: torch.dtype | None = None) -> "torch.Tensor | LowBit":
        """Dense, by way of bfloat16, in `dtype`; without one only moved."""
        codes, scales = self.codes.to(device), self.scales.to(device)
        if dtype is None:
            return LowBit(codes, scales, self.block)
        return (_mxfp4(codes, scales) if self.is_mxfp4 else _float8(codes, scales, self.block)).bfloat16().to(dtype)


Stored = torch.Tensor | LowBit
"""Matrices as a checkpoint has them."""


def _float8(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    rows, columns = codes.shape[-2:]
    full = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return codes.float() * full[..., :rows, :columns]


def _mxfp4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    values = torch.tensor(FP4, device=codes.device)
    pairs = torch.stack((values[(codes & 15).int()], values[(codes >> 4).int()]), -1)  # low half first
    return torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - 127).flatten(-2)
