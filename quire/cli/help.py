"""Help pages and docs/reference/flags.md, rendered from the settings table.

Knows the tables only; a new setting appears here by itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from quire.cli.options import COMMANDS, HELP, VERSION, Command, Option
from quire.config import ENV_ALIASES, FILE_ALIASES, FLAG_ALIASES, NEGATED, flag, settings, variable
from quire.version import __version__

SECTIONS = {
    "model": "what is served",
    "server": "addresses, limits and keys",
    "scheduler": "how requests share a step",
    "cache": "KV memory",
    "worker": "devices and threads",
    "observability": "logs and traces",
}


def overview() -> str:
    """What `quire` and `quire --help` print."""
    lines = [
        f"Quire {__version__}: LLM inference from paged KV memory, as small services.",
        "",
        "usage: quire COMMAND [MODEL] [--setting value ...]",
        "",
        *(f"  {c.name:<11}{c.summary}" for c in COMMANDS),
        "",
        "  quire serve                       the embedded demo model at http://127.0.0.1:8000",
        "  quire serve ./my-model --port 80  any Llama, Qwen2, Qwen3 or Mistral checkpoint",
        "  quire chat                        talk to the demo model",
        "",
        f"  {HELP.name:<14}{HELP.help}",
        f"  {VERSION.name:<14}{VERSION.help}",
        "",
        "quire COMMAND --help shows a command's options and the common settings.",
    ]
    return "\n".join(lines)


def short(command: Command) -> str:
    """One screen: the command's options and the common settings."""
    lines = [_usage(command), "", f"{command.summary[0].upper()}{command.summary[1:]}.", ""]
    lines += _options(command)
    lines += ["", "Common settings:"]
    for f in settings():
        if f.metadata["common"]:
            lines.append(_row(flag(f.name) + " " + _metavar(f), f"{f.metadata['help']}{_given(f)}"))
    lines += [
        "",
        "Each setting is also a variable (--port: QUIRE_PORT) and a key in a TOML file.",
        f"All settings: quire {command.name} --help=all",
    ]
    return "\n".join(lines)


def everything(command: Command | None) -> str:
    """Every setting by section, with default, variable and other spellings."""
    lines = [_usage(command), "", *_options(command)] if command else [overview()]
    for section, title in SECTIONS.items():
        lines += ["", f"[{section}] {title}"]
        for f in _fields(section):
            lines.append(f"  {_spelled(f)}")
            lines.append(f"      {f.metadata['help']}{_given(f)}")
            others = "".join(f", {name}" for name in _aliases(f.name))
            lines.append(f"      {variable(f.name)}{others}")
    return "\n".join(lines)


def reference() -> str:
    """docs/reference/flags.md."""
    lines = [
        "# Settings",
        "",
        "Made by `make docs` from the table in `quire/config.py`; don't edit.",
        "",
        "Each setting is a flag, a variable and a key in the TOML file that `--config` names",
        "(section in brackets). A flag wins over a variable, a variable over the file.",
        "`quire serve --print-config` shows each value and where it came from.",
    ]
    for section, title in SECTIONS.items():
        lines += ["", f"## [{section}] {title}", "", "| flag | default | what | variable | also |"]
        lines.append("|---|---|---|---|---|")
        for f in _fields(section):
            also = ", ".join(f"`{name}`" for name in _aliases(f.name))
            what = f.metadata["help"] + _bounds(f)
            spelled = _spelled(f).replace("|", "\\|")
            default = _default(f) or "-"
            lines.append(f"| `{spelled}` | {default} | {what} | `{variable(f.name)}` | {also} |")
    lines += ["", "## Commands and their options", ""]
    for command in COMMANDS:
        lines += [f"### quire {command.name}", "", f"{command.summary}.", ""]
        for option in command.options:
            default = f" (default {option.default})" if option.default else ""
            lines.append(f"- `{_option_spelled(option)}`: {option.help}{default}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


Field = dataclasses.Field[Any]


def _usage(command: Command) -> str:
    words = "".join(f" [{w}]" if w == "MODEL" else f" {w}" for w in command.words)
    return f"usage: quire {command.name}{words} [--setting value ...]"


def _options(command: Command) -> list[str]:
    rows = ["Options:"]
    for option in (*command.options, HELP):
        default = f" (default {option.default})" if option.default else ""
        rows.append(_row(_option_spelled(option), option.help + default))
    return rows


def _row(left: str, right: str) -> str:
    return f"  {left:<34} {right}"


def _option_spelled(option: Option) -> str:
    return f"{option.name} {option.metavar}".strip()


def _fields(section: str) -> list[Field]:
    return [f for f in settings() if f.metadata["section"] == section]


def _metavar(f: Field) -> str:
    kind, choices = f.metadata["kind"], f.metadata["choices"]
    if kind == "bool":
        return ""
    if choices and len(choices) <= 3:
        return "|".join(choices)
    return {"int": "N", "count": "N", "size": "SIZE", "float": "X", "list": "A,B"}.get(kind, "TEXT")


def _spelled(f: Field) -> str:
    if f.metadata["kind"] == "bool":
        return "--[no-]" + f.name.replace("_", "-")
    return f"{flag(f.name)} {_metavar(f)}"


def _default(f: Field) -> str:
    value: Any = f.default
    if f.metadata["kind"] == "bool":
        return "on" if value else "off"
    if f.metadata["kind"] == "count" and value == 0:
        return "auto"
    if f.metadata["kind"] == "size" and value and value % (1 << 20) == 0:
        return f"{value >> 20}MiB"
    return "" if value in ("", ()) else str(value)


def _given(f: Field) -> str:
    """' (default x)', with the choices where the metavar does not show them."""
    choices = f.metadata["choices"]
    parts = [", ".join(choices)] if choices and len(choices) > 3 else []
    default = _default(f)
    said = default in ("auto", "0") and f"{default} =" in f.metadata["help"]
    if default and not said and not (default == "auto" and "auto" in f.metadata["help"]):
        parts.append(f"default {default}")
    return f" ({'; '.join(parts)})" if parts else ""


def _bounds(f: Field) -> str:
    if f.metadata["choices"] and len(f.metadata["choices"]) > 3:
        return f" ({', '.join(f.metadata['choices'])})"
    if f.metadata["low"] is None:
        return ""
    low, high = (f"{v:,}" for v in (f.metadata["low"], f.metadata["high"]))
    return f" ({low} to {high})"


def _aliases(name: str) -> list[str]:
    """Other people's spellings of a setting."""
    found = [flag(alias) for alias, target in FLAG_ALIASES.items() if target == name]
    found += [flag(alias) for alias, target in NEGATED.items() if target == name]
    found += [key for key, alias in ENV_ALIASES.items() if alias.name == name]
    found += [f"[{s}] {key}" for (s, key), alias in FILE_ALIASES.items() if alias.name == name]
    return found
