"""Pages: the Prometheus pages of several services as one.

Every sample gets a `service` label, every family one HELP and one TYPE. Works on text lines,
because a full parse of large pages would hold the event loop. Knows no metric by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_SUFFIXES = ("_total", "_bucket", "_count", "_sum", "_created", "_info")


@dataclass
class _Family:
    kind: str = ""
    help: str = ""
    samples: list[str] = field(default_factory=list)


def merge(pages: Iterable[tuple[str, str]]) -> str:
    """One page of (service, page). A family whose type differs from the one seen first is left
    out for that service; lines that are no samples are dropped."""
    families: dict[str, _Family] = {}
    for service, page in pages:
        refused: set[str] = set()
        for line in page.splitlines():
            words = line.split(None, 3)
            if not words:
                continue
            if words[0] == "#":
                if len(words) > 2 and words[1] in ("HELP", "TYPE"):
                    rest = words[3] if len(words) > 3 else ""
                    _describe(families, refused, words[1], words[2], rest)
                continue
            match = _NAME.match(line)
            if match:
                name = _family(families, match[0])
                if name not in refused:
                    families.setdefault(name, _Family()).samples.append(
                        _labelled(line, match.end(), service)
                    )
    return "".join(_render(name, f) for name, f in families.items() if f.samples)


def _describe(
    families: dict[str, _Family], refused: set[str], what: str, name: str, text: str
) -> None:
    family = families.setdefault(name, _Family())
    if what == "HELP":
        family.help = family.help or text
    elif not family.kind:
        family.kind = text
    elif family.kind != text:
        refused.add(name)


def _family(families: dict[str, _Family], sample: str) -> str:
    """The family a sample belongs to: its name, perhaps without a suffix."""
    if sample in families:
        return sample
    for suffix in _SUFFIXES:
        if sample.endswith(suffix) and sample.removesuffix(suffix) in families:
            return sample.removesuffix(suffix)
    return sample


def _labelled(line: str, end: int, service: str) -> str:
    """The sample with the service's label first; one that has such a label keeps its own."""
    label = f'service="{service}"'
    name, rest = line[:end], line[end:]
    if not rest.startswith("{"):
        return f"{name}{{{label}}}{rest}"
    if rest.startswith("{}"):
        return f"{name}{{{label}}}{rest[2:]}"
    if re.match(r'\{(?:[^"]*"(?:[^"\\]|\\.)*",)*\s*service="', rest):
        return line
    return f"{name}{{{label},{rest[1:]}"


def _render(name: str, family: _Family) -> str:
    head = f"# HELP {name} {family.help}\n" if family.help else ""
    head += f"# TYPE {name} {family.kind}\n" if family.kind else ""
    return head + "\n".join(family.samples) + "\n"
