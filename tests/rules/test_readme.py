"""What the README tells people to type exists."""

from __future__ import annotations

import json
import re
import shlex
import subprocess

from quire.cli.options import find, parse
from rules.sources import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_python_examples_compile() -> None:
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        compile(block, "README.md", "exec")


def test_quire_commands_parse() -> None:
    commands = re.findall(r"^(?:\.venv/bin/)?quire (.+)$", "\n".join(blocks("sh")), re.MULTILINE)
    assert len(commands) >= 4
    for text in commands:
        words = shlex.split(text, comments=True)
        parse(find(words[0]), words[1:])


def test_curl_examples_send_json() -> None:
    bodies = re.findall(r"-d '(.*?)'", README, re.DOTALL)
    assert bodies
    for body in bodies:
        assert json.loads(body)["model"] == "demo"


def test_make_verbs_exist() -> None:
    for verb in {*re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE)}:
        done = subprocess.run(["make", "-n", verb], cwd=ROOT, capture_output=True, timeout=60)
        assert done.returncode == 0, verb


def test_linked_files_exist() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
