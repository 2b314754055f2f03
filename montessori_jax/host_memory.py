"""The host's memory between stages."""

import ctypes
import gc
import sys


def return_freed_memory() -> None:
    """Give freed memory back to the system, where the C library would keep it for later.

    A stage leaves gigabytes of freed arrays behind, in pieces between which the next stage's
    larger ones do not fit: without this, peaks of stages add up. Does nothing outside glibc.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
