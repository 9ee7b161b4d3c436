"""What benchmarks have in common: the machine's line, and results that go on the screen and into a file alike."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.table import Table


def machine(*packages: str) -> str:
    """Processor and memory, Python's version and those of packages."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = f"{len(os.sched_getaffinity(0))} cores of {processor()}, {size:.0f} GiB"
    return ", ".join(
        [cores, f"Python {platform.python_version()}", *(f"{name} {metadata.version(name)}" for name in packages)]
    )


def processor() -> str:
    """Its name, where Linux tells; else its architecture. Ratios of speeds are not the same on all of them."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def publish(path: Path, items: Iterable[str | Table], *, width: int = 150, append: bool = False) -> None:
    """Print lines and tables, and write them to `path`: instead of what is there, or behind it."""
    text = StringIO()
    consoles = Console(width=width), Console(width=width, file=text)
    for item in items:
        for console in consoles:
            if isinstance(item, str):
                console.print(item, highlight=False, markup=False, soft_wrap=True)
            else:
                console.print(item)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w", encoding="utf-8") as file:
        file.write(text.getvalue())
