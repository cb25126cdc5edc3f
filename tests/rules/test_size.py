"""No module grows past what a reader can hold, unless somebody said why."""

from __future__ import annotations

from rules.sources import ROOT, everything

MOST = 400
# path -> why it may be longer
LONGER = {
    "quire/config.py": "the one table of all settings, with the readers of its values",
    "scheduler/quire_scheduler/driver.py": "one group's epochs: what begins, feeds and ends them",
}


def test_modules_are_short_or_listed_with_a_reason() -> None:
    long = {}
    for path in everything():
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > MOST:
            long[str(path.relative_to(ROOT))] = count
    unlisted = {name: count for name, count in long.items() if name not in LONGER}
    assert not unlisted, f"more than {MOST} lines: {unlisted}"
    assert not set(LONGER) - set(long), "listed, but short again"
