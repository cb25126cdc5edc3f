"""The command `quire`: finds the command, resolves the settings, and turns errors into a status.

Imports no service and nothing heavy; a command's own module is imported when it runs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from quire.cli import help as pages
from quire.cli.options import COMMANDS, Command, Line, find, parse
from quire.config import resolve
from quire.errors import ConfigError, QuireError, StartupError
from quire.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    # gRPC's own log lines speak of its insides; what matters is logged by us
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    if "QUIRE_SUPERVISED" in os.environ:
        from quire.cli.child import end_with_parent

        end_with_parent()
    try:
        return _dispatch(words)
    except StartupError as error:
        print(error, file=sys.stderr)
        return error.kind.exit_status
    except QuireError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.kind.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    if not words:
        print(pages.overview())
        return 0
    first = words[0]
    if first in ("--version", "-V", "version"):
        print(f"quire {__version__}")
        return 0
    if first == "help":
        words = [*words[1:2], "--help"]
    if words[0].startswith("-"):
        if (page := _help(None, words)) is not None:
            print(page)
            return 0
        names = ", ".join(c.name for c in COMMANDS)
        raise ConfigError(f"the command comes first, then {words[0]}. Commands: {names}.")
    command = find(words[0])
    if (page := _help(command, words[1:])) is not None:
        print(page)
        return 0
    line = parse(command, words[1:])
    resolved = resolve(line.settings, file=line.options.get("config"))
    if "print_config" in line.options:
        print(resolved.table())
        return 0
    module, _, function = command.entry.partition(":")
    status: int = getattr(import_module(module), function)(line, resolved)
    return status


def _help(command: Command | None, words: Sequence[str]) -> str | None:
    """The help page that the words ask for, if they do."""
    for word in words:
        if word == "--":
            return None
        if word in ("--help", "-h"):
            return pages.short(command) if command else pages.overview()
        if word == "--help=all":
            return pages.everything(command)
        if word.startswith("--help="):
            raise ConfigError(f"{word}: expected --help or --help=all.")
    return None


__all__ = ["Line", "main"]
