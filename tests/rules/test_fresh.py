"""Generated files are what their sources make of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rules.sources import GENERATED, ROOT


def test_generated_protos_are_fresh(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "scripts" / "protos.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {p.name: p.read_text() for p in GENERATED.iterdir() if "_pb2" in p.name}
    kept = {name: text for name, text in kept.items() if not name.endswith(".pyc")}
    assert made == kept, "run: make protos"


def test_reference_pages_are_fresh(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import reference\n"
    code += "from pathlib import Path\nfor n, t in reference.pages().items(): "
    code += "(Path(sys.argv[1]) / n).write_text(t, encoding='utf-8')"
    subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], check=True, timeout=100)
    for made in tmp_path.iterdir():
        kept = ROOT / "docs" / "reference" / made.name
        assert kept.read_text(encoding="utf-8") == made.read_text(encoding="utf-8"), (
            f"{made.name} is stale; run: make docs"
        )
