"""Test set-up. jax is imported only where it is installed and a test needs it: torch-only tests run without it."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# Read by jax when it is first imported: eight CPU devices, and no look for accelerators.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests that train the same small model again (resume, refuse) compile it once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="cltjax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny matrices in torch: a second thread only costs."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
