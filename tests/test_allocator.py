"""A process that trains keeps the memory it frees."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import ctypes, resource, sys
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "keep":
    from speedrl_lab.allocator import keep_memory
    assert keep_memory() and keep_memory()

def work():  # as an update does: eight large blocks, written and freed
    blocks = [libc.malloc(8 << 20) for _ in range(8)]
    for block in blocks:
        ctypes.memset(block, 1, 8 << 20)
    for block in reversed(blocks):
        libc.free(block)

work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_what_is_freed_is_not_asked_for_again():
    faults = {
        how: int(subprocess.run([sys.executable, "-c", COUNT, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "return")
    }
    assert faults["keep"] < 100 < faults["return"]  # 163,840 pages of 4 KiB are written
