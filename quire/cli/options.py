"""The commands and their own options; settings (flags of EngineConfig) come on top.

Splits a command line into three: options of the command, settings, positional words. Knows
neither what a command does nor where settings come from.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

from quire.config import split_flags
from quire.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """`--name` of one command. metavar '' = a switch; low/high: bounds of a number."""

    name: str
    help: str
    metavar: str = ""
    default: str = ""

    @property
    def key(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")


HELP = Option("--help", "this page; --help=all: every setting, with variables and aliases")
VERSION = Option("--version", "print the version")
CONFIG = Option("--config", "settings from a TOML file (flag > QUIRE_* > file)", "FILE")
PRINT = Option("--print-config", "print each setting's value and where it came from")
SIMULATE = Option("--simulate", "no model: step times from a latency table", "TABLE")
_SETTINGS = (CONFIG, PRINT)


@dataclass(frozen=True)
class Command:
    """One verb. entry: 'module:function', imported when it runs; words: what follows it by place,
    MODEL for the setting, others for options of that name."""

    name: str
    summary: str
    entry: str
    options: tuple[Option, ...] = ()
    words: tuple[str, ...] = ()


COMMANDS = (
    Command(
        "serve",
        "start gateway, scheduler and worker, and keep them running",
        "quire.cli.serve:run",
        (
            Option("--dry-run", "check everything, print the plan, start nothing"),
            SIMULATE,
            *_SETTINGS,
        ),
        ("MODEL",),
    ),
    Command(
        "generate",
        "complete one prompt, without a server",
        "quire.cli.generate:run",
        (
            Option("--prompt", "the text to go on from; - reads it from stdin", "TEXT"),
            Option("--max-tokens", "most tokens to make", "N", "128"),
            Option("--temperature", "0 = always the likeliest token; else the model's", "X"),
            Option("--top-p", "sample from the likeliest tokens of this mass", "X"),
            Option("--top-k", "sample from the k likeliest tokens; 0 = all", "N"),
            Option("--seed", "same seed, same text", "N"),
            Option("--stop", "end at this string", "TEXT"),
            *_SETTINGS,
        ),
        ("MODEL",),
    ),
    Command(
        "chat",
        "talk to a model; /quit ends",
        "quire.cli.chat:run",
        (
            Option("--url", "a running server; default: no server, in this process", "URL"),
            Option("--system", "instructions that come first", "TEXT"),
            Option("--max-tokens", "most tokens in an answer", "N", "512"),
            Option("--temperature", "0 = always the likeliest token; else the model's", "X"),
            Option("--seed", "same seed, same answers", "N"),
            *_SETTINGS,
        ),
        ("MODEL",),
    ),
    Command(
        "blocks",
        "who has the KV blocks of a running server, their age and hits",
        "quire.cli.blocks:run",
        (
            Option("--id", "these blocks; default: those most often found again", "A,B"),
            Option("--limit", "how many, when no --id is given", "N", "32"),
            Option("--tier", "where: device or host", "TIER", "device"),
            *_SETTINGS,
        ),
    ),
    Command("gateway", "only the gateway (HTTP)", "quire.cli.services:gateway", _SETTINGS),
    Command("scheduler", "only the scheduler", "quire.cli.services:scheduler", _SETTINGS),
    Command(
        "worker",
        "only a worker (one per device)",
        "quire.cli.services:worker",
        (
            Option("--rank", "which worker this is", "N", "0"),
            SIMULATE,
            Option("--count", "simulated ranks in this process", "N", "1"),
            *_SETTINGS,
        ),
    ),
    Command(
        "simulate",
        "what a configuration would do with a trace, without a model",
        "quire.cli.simulate:run",
        (
            Option("--trace", "requests to simulate: JSON lines, or a journal", "FILE"),
            Option("--generate", "made-up requests, as chat:rate=5,requests=1000", "SPEC"),
            Option("--table", "step times: a latency table, or a journal", "FILE"),
            Option("--workers", "worker groups, each with a scheduler", "N", "1"),
            Option("--route", "which group gets a request: by load or by prefix", "HOW", "load"),
            Option("--seed", "of what is made up and drawn", "N", "0"),
            Option("--max-time", "stop after so many virtual seconds; 0 = at the end", "S", "0"),
            Option("--json", "print the report as JSON"),
            Option("--calibrate", "only write the table: of --table JOURNAL, or a worker", "OUT"),
            Option("--write-trace", "only write the requests as JSON lines", "OUT"),
            *_SETTINGS,
        ),
    ),
    Command(
        "replay",
        "run a journal's plans again and compare every result",
        "quire.cli.replay:run",
        _SETTINGS,
        ("PATH",),
    ),
    Command(
        "journal",
        "show what a journal holds, or make a trace of it",
        "quire.cli.journal:run",
        (
            Option("--request", "only what concerns this request", "ID"),
            Option("--epoch", "only this epoch", "N"),
            Option("--from", "only from so many seconds on", "S"),
            Option("--to", "only up to so many seconds", "S"),
            Option("--json", "one JSON object a line"),
            *_SETTINGS,
        ),
        ("ACTION", "PATH"),
    ),
)


@dataclass(frozen=True)
class Line:
    """A command line taken apart. options: only what was given; settings: field -> text."""

    command: Command
    options: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    def option(self, key: str) -> str:
        """What was given for an option, or its default; switches are '1' or ''."""
        if key in self.options:
            return self.options[key]
        return next((o.default for o in self.command.options if o.key == key), "")

    def number(self, key: str, low: float, high: float) -> float:
        """A finite option between low and high. Raises ConfigError with the bounds."""
        text = self.option(key)
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            name = "--" + key.replace("_", "-")
            raise ConfigError(f"{name} must be between {low:g} and {high:g}, not {text!r}.")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        """An integer option between low and high. Raises ConfigError with the bounds."""
        text = self.option(key)
        name = "--" + key.replace("_", "-")
        try:
            value = int(text)
        except ValueError:
            raise ConfigError(f"{name} must be an integer, not {text!r}.") from None
        if not low <= value <= high:
            raise ConfigError(f"{name} must be between {low} and {high}, not {text}.")
        return value


def find(name: str) -> Command:
    """The command of that name. Raises ConfigError with a suggestion."""
    for command in COMMANDS:
        if command.name == name:
            return command
    names = [c.name for c in COMMANDS]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Commands: {', '.join(names)}."
    raise ConfigError(f"unknown command {name!r}. {hint}")


def parse(command: Command, words: Sequence[str]) -> Line:
    """Take `words` (what follows the command) apart.

    Raises ConfigError for what the command does not take.
    """
    options, rest = _take(command.options, list(words))
    settings, positional = split_flags(rest, also=[o.name for o in command.options])
    for place, word in zip(command.words, positional, strict=False):
        if place != "MODEL":
            options[place.lower()] = word
            continue
        if settings.get("model", word) != word:
            raise ConfigError(
                f"two models: {word!r} and --model {settings['model']!r}; give one of them."
            )
        settings["model"] = word
    positional = positional[len(command.words) :]
    if positional:
        raise ConfigError(
            f"{command.name} does not take {positional[0]!r}; see quire {command.name} --help."
        )
    return Line(command, options, settings)


def _take(known: Sequence[Option], words: list[str]) -> tuple[dict[str, str], list[str]]:
    """The command's own options out of the words, and the other words."""
    table = {o.name: o for o in known}
    found: dict[str, str] = {}
    rest: list[str] = []
    while words:
        word = words.pop(0)
        if word == "--":
            return found, [*rest, "--", *words]
        name, has_value, value = word.partition("=")
        option = table.get(name)
        if option is None:
            rest.append(word)
        elif not option.metavar:
            if has_value:
                raise ConfigError(f"{name} takes no value.")
            found[option.key] = "1"
        elif has_value or words:
            found[option.key] = value if has_value else words.pop(0)
        else:
            raise ConfigError(f"{name} needs a value: {option.help}.")
    return found, rest
