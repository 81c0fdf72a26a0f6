"""The device to compute on, and whether bfloat16 pays on it."""

from __future__ import annotations

import torch


def native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware.

    True for CUDA devices of compute capability 8.0 and up, and for x86 CPUs with AMX or AVX512-BF16. On a CPU
    with neither, bf16 matmul was measured at a twelfth of the float32 rate.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def fast_dtype(device: torch.device, bf16: bool) -> torch.dtype:
    """bfloat16 if it is wanted and `device` has it in hardware, float32 otherwise."""
    return torch.bfloat16 if bf16 and native_bf16(device) else torch.float32


def device() -> torch.device:
    """The first GPU if there is one (hide it with CUDA_VISIBLE_DEVICES=), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
