import platform
import resource
import subprocess
import sys

import pytest

STEPS = 11
SIZE = 3001  # glibc always maps what is larger than 32 MiB
COUNT_FAULTS = f"""
import resource, sys
import jax, jax.numpy as jnp
from cltjax.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
work = jax.jit(lambda x: jnp.cumsum(jnp.outer(x, x), 0).sum())
x = jnp.ones({SIZE})
for _ in range(10):
    work(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({STEPS}):
    work(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = SIZE * SIZE * 4 // resource.getpagesize()  # of one temporary array


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_temporaries_of_a_step_are_not_mapped_again():
    def faults_a_step(what: str) -> float:
        command = [sys.executable, "-c", COUNT_FAULTS, what]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / STEPS

    assert faults_a_step("leave") > PAGES  # what it is for: if this fails, it is needed no longer
    assert faults_a_step("keep") < PAGES
