"""Generate docs/reference from the tables in the code: `make docs`."""

from __future__ import annotations

from pathlib import Path

from quire.cli.help import reference

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reference"


def pages() -> dict[str, str]:
    """File name -> text of every generated page."""
    return {"flags.md": reference()}


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)
