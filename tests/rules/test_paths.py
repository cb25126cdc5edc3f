"""Layout that other tools depend on."""

from __future__ import annotations

import re

from rules.sources import ROOT


def test_service_folders_are_no_packages() -> None:
    for folder in ("gateway", "scheduler", "worker", "kernels"):
        assert not (ROOT / folder / "__init__.py").exists()
        assert (ROOT / folder / "README.md").is_file(), f"{folder} lacks its page"


def test_constraints_hold_plain_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    wrong = [line for line in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)]
    assert not wrong
    assert "torch==2.13.0" in pins
