"""Unused memory: released to the device and the system, or kept for the next forward."""

from __future__ import annotations

import ctypes
import gc

import torch

# Of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
# More than a forward of a small model takes at once, and little beside what a machine has.
_KEPT_BYTES, _PAD_BYTES, _MAPPED_BYTES = 256 << 20, 16 << 20, 32 << 20


def release_memory() -> None:
    """Release unused memory to the device and the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have none
        trim(0)


def keep_freed_memory() -> None:
    """Have the allocator keep some of what is freed, so that not every tensor's pages are made and cleared anew.

    As it is, glibc gives memory back to the system as soon as 128 KiB, later 64 MiB, of it are free in one piece; pages
    made anew for every forward were a seventh of a small model's trial (docs/lab-notes/workers.md).
    """
    configure = getattr(ctypes.CDLL(None), "mallopt", None)
    if configure is None:
        return
    configure(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
    configure(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    configure(_M_TOP_PAD, _PAD_BYTES)
