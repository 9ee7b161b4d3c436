"""What every entry point does around its work: parse typed options, and turn a UserError into one line."""

import errno
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from cltjax.errors import UserError

Config = TypeVar("Config")

FULL = (errno.ENOSPC, errno.EDQUOT)
INTERRUPTED = 130  # what shells give a program that Ctrl-C has ended


def run(
    config: type[Config],
    work: Callable[[Config], object],
    args: Sequence[str] | None = None,
    default: Callable[[Sequence[str]], Config | None] | None = None,
) -> None:
    """Parse `config` (a documented dataclass) from the command line and do `work` with it.

    `default` may find the options' starting point among the arguments (a config file); what is named beside it wins.
    Exits with status 2 and one line on standard error where the user can mend what is wrong, and with 130 and one line
    after Ctrl-C.
    """
    given = list(sys.argv[1:] if args is None else args)
    try:
        start = default(given) if default else None
        # A switch is written `--switch`; there is no `--no-switch`.
        markers = (tyro.conf.FlagCreatePairsOff,)
        if start is None:
            options = tyro.cli(config, args=given, description=work.__doc__, config=markers)
        else:
            options = tyro.cli(config, args=given, description=work.__doc__, config=markers, default=start)
        work(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno in FULL:
            where = error.filename or "a file"
            print(f"error: {where} cannot be written: {error.strerror}. Make room, and start again", file=sys.stderr)
        elif error.filename is None:
            raise
        else:
            print(f"error: {error.filename}: {error.strerror}: name another path, or mend that one", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
