"""Dequantisation of block-scaled and MXFP4 tensors."""

from __future__ import annotations

import torch
from torch import Tensor

# Values per slab, which limits intermediate results to a few megabytes.
_SLAB = 1 << 22
# Indexed by the four bits of an E2M1 number.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantised_blocks(values: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Multiply every block of a matrix [n, m] with its scale.

    Args:
        values: The quantised matrix [n, m], any floating dtype.
        scales: Scales of the blocks, [⌈n / b⌉, ⌈m / c⌉], or one for all; uint8 holds exponents of 2 with bias 127.
        block: Rows b and columns c of a block.
        dtype: Type of the result; products are computed in float32 and rounded once.
    """
    rows, columns = values.shape
    high, wide = block
    factors = torch.exp2(scales.to(torch.float32) - 127) if scales.dtype == torch.uint8 else scales.to(torch.float32)
    factors = factors.reshape(-(-rows // high), -(-columns // wide))
    result = torch.empty(values.shape, dtype=dtype, device=values.device)
    step = max(1, _SLAB // (columns * high))  # rows of blocks
    for first in range(0, len(factors), step):
        slab_rows = slice(first * high, (first + step) * high)
        slab = values[slab_rows].to(torch.float32)
        spread = factors[first : first + step].repeat_interleave(wide, dim=1)[:, :columns]
        result[slab_rows] = slab.mul_(spread.repeat_interleave(high, dim=0)[: len(slab)])
    return result


def dequantised_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an expert's matrix from the MXFP4 format, transposed as gpt-oss holds it: [32 g, n].

    Args:
        blocks: Two weights per byte, the lower half first, [n, g, 16], uint8.
        scales: Exponent of 2 per block, bias 127, [n, g], uint8.
        dtype: Type of the result; exact in bfloat16 and wider types.
    """
    rows, count, width = blocks.shape
    table = torch.tensor(_FP4, dtype=torch.float32, device=blocks.device)
    result = torch.empty(rows, count * 2 * width, dtype=dtype, device=blocks.device)
    step = max(1, _SLAB // (count * 2 * width))
    for first in range(0, rows, step):
        slab = blocks[first : first + step]
        halves = torch.stack([table[(slab & 15).int()], table[(slab >> 4).int()]], dim=-1)
        exponents = scales[first : first + step].to(torch.int32) - 127
        weights = torch.ldexp(halves, exponents[..., None, None])
        result[first : first + step] = weights.reshape(len(slab), -1)
    return result.T
