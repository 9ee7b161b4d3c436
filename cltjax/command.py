"""What every entry point does around its work: parse typed options, and turn a UserError into one line."""

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from cltjax.errors import UserError

Config = TypeVar("Config")


def run(config: type[Config], work: Callable[[Config], object], args: Sequence[str] | None = None) -> None:
    """Parse `config` (a documented dataclass) from the command line and do `work` with it.

    Exits with status 2 and one line on standard error where the user can mend what is wrong.
    """
    options = tyro.cli(config, args=args, description=work.__doc__, config=(tyro.conf.FlagConversionOff,))
    try:
        work(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
