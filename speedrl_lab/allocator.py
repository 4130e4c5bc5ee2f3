"""Memory of the C library that a training on a CPU frees and asks for again, thousands of times an update."""

import ctypes
import platform
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt, in malloc.h
LARGEST = 2**30
"""Bytes of free memory, or of one block, from which glibc gives back to the system."""


def keep_memory() -> bool:
    """Let this process keep what it frees, for its next allocations; whether its C library can (glibc).

    By default glibc returns what is freed at the end of its heap, and every page that comes back is cleared by the
    system: a tenth of the time of an update of the embedded generator. What a process holds at its peak it then
    holds to its end, or until `give_back`.
    """
    library = _glibc()
    return library is not None and all(library.mallopt(name, LARGEST) for name in (TRIM_THRESHOLD, MMAP_THRESHOLD))


def give_back() -> None:
    """Return to the system, once, what this process has freed: it counts as free again."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, where it is glibc; looked for at the first call, in the interpreter's file."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
