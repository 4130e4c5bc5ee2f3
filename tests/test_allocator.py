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
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():  # MiB
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

held = resident()
if sys.argv[1] == "keep":
    from speedrl_lab.allocator import give_back
    give_back()
print(faults, held - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_what_is_freed_is_not_asked_for_again_and_can_be_given_back():
    def measured(how: str) -> list[int]:
        shown = subprocess.run([sys.executable, "-c", COUNT, how], check=True, capture_output=True, text=True).stdout
        return [int(number) for number in shown.split()]

    (kept, returned), (usual, _) = measured("keep"), measured("return")
    assert kept < 100 < usual  # 163,840 pages of 4 KiB are written
    assert returned > 50  # of 64 MiB
