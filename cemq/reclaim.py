"""Keeping the process small while a large model is quantized or loaded."""

from __future__ import annotations

import ctypes
import functools
import mmap

import torch

_M_MMAP_THRESHOLD = -3  # of mallopt
_MADV_PAGEOUT = 21  # Linux 5.4; takes pages out of memory without losing what they hold


def give_back(used: torch.Tensor) -> None:
    """Return memory to the system that was needed to quantize or copy a weight and is not any more.

    Pages of ``used``, if it lies in a memory-mapped file, and what glibc would keep: each layer's float values leave a
    hole in its heap between quantized weights that stay, and on a 350 M model these holes came to 1.5 times the model.
    Does nothing where the system has no such calls.
    """
    libc = _libc()
    if libc is None or used.device.type != "cpu":
        return
    start, end = used.data_ptr(), used.data_ptr() + used.numel() * used.element_size()
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        libc.madvise(start, end - start, _MADV_PAGEOUT)
    libc.malloc_trim(0)


def map_large_allocations() -> None:
    """Have glibc map every allocation from 1 MiB on by itself, for the rest of the process.

    diffusers builds models of empty tensors, and replaces weights that it moved to disk by such. Mapped, these take no
    memory; taken from the heap they lie on pages that something else has written to before, and a model on disk was as
    large as one in memory. Those of a model that is being built leave a hole as large as it: glibc maps nothing while
    its heap has room, weights that come from disk filled the hole one behind the other, and it kept every page, 70 MB
    where 4 were in use. Does nothing where the system has no such call.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
        libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    except (OSError, AttributeError, TypeError):  # not Linux, or not glibc
        return None
    return libc
