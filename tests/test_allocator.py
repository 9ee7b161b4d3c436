import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata, util

import jax
import pytest

from cltjax import training
from cltjax.allocator import will_use_cpu
from cltjax.config import TrainConfig

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


@pytest.fixture
def asked_for() -> Iterator[Callable[[str | None], None]]:
    """Sets jax's platforms for the time of a test."""
    before = getattr(jax.config, "jax_platforms", None)
    yield lambda platforms: jax.config.update("jax_platforms", platforms)
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize("platforms, cpu", [("cpu", True), ("cuda,cpu", False), ("cpu,cuda", True)])
def test_the_platform_that_was_asked_for(asked_for: Callable[[str | None], None], platforms: str, cpu: bool):
    asked_for(platforms)
    assert will_use_cpu() == cpu


def test_without_a_plugin_jax_computes_on_the_cpu(
    asked_for: Callable[[str | None], None], monkeypatch: pytest.MonkeyPatch
):
    asked_for(None)
    monkeypatch.setattr(metadata, "entry_points", lambda group: ())
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert will_use_cpu()
    monkeypatch.setattr(metadata, "entry_points", lambda group: ("cuda12",))
    assert not will_use_cpu()
    monkeypatch.setattr(metadata, "entry_points", lambda group: ())
    monkeypatch.setattr(util, "find_spec", lambda name: "a folder" if name == "jax_plugins" else None)
    assert not will_use_cpu()


def test_training_sets_it_before_jax_starts(monkeypatch: pytest.MonkeyPatch):
    class StartedError(Exception):
        pass

    done = []

    def start(_: object) -> None:
        raise StartedError

    monkeypatch.setattr(training, "will_use_cpu", lambda: True)
    monkeypatch.setattr(training, "keep_freed_memory", lambda: done.append(True))
    monkeypatch.setattr(training, "start", start)
    with pytest.raises(StartedError):
        training.train(TrainConfig(layer="0"))
    assert done
