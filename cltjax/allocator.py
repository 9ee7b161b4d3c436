"""The C library's allocator, where the CPU is the device."""

import ctypes
import platform
from importlib import metadata, util

import jax

# glibc's mallopt parameters (malloc.h). Arenas other than the first one map what is large, whatever is set.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next step, instead of giving it back to the system. Whether that was done.

    To be called before jax starts its threads: those that have begun to allocate keep to their ways.

    XLA allocates a step's temporaries anew each time. By default glibc maps and unmaps them, and every page of them
    costs a page fault: a tenth to a third of a training step. The process stays as large as it was at its largest.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_ARENA_MAX, 1) and mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, MOST))


def will_use_cpu() -> bool:
    """Whether jax will compute on the CPU: it was told to, or has no plugin for anything else. Starts nothing."""
    platforms: str | None = getattr(jax.config, "jax_platforms", None)
    if platforms:
        return platforms.split(",")[0] == "cpu"
    return not (metadata.entry_points(group="jax_plugins") or util.find_spec("jax_plugins"))
