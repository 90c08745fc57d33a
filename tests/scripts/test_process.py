"""A command's process."""

import subprocess
import sys

import pytest

#: Frees a large block, and prints how many the C library takes from the system of its own for the
#: next one, which is smaller.
FREED = """
import ctypes
from fusion_bench.scripts.process import return_large_blocks

libc = ctypes.CDLL(None)
if not hasattr(libc, "mallinfo2"):
    print("unknown")
    raise SystemExit
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mallinfo2.restype = type("Info", (ctypes.Structure,), {
    "_fields_": [(name, ctypes.c_size_t) for name in "abcdefghij"]
})
for prepare, size in ((lambda: None, 2**23), (return_large_blocks, 2**23 + 2**22)):
    prepare()
    libc.free(libc.malloc(2**24))
    before = libc.mallinfo2().d
    own = libc.malloc(size)
    print(libc.mallinfo2().d - before)
    libc.free(own)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_large_blocks_are_returned_after_larger_ones_too() -> None:
    run = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    if "unknown" in run.stdout:
        pytest.skip("needs glibc 2.33")
    assert run.stdout.split() == ["0", "1"]
