"""Make .venv and install exact versions into it, showing progress; done once per change.

`python scripts/setup.py serve|dev [--torch cpu]`. A stamp in .venv holds the hash of what the
installation depends on, so that a second run only reads two files and needs no network.
Knows no make; runs with nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = VENV / "install.log"
EXTRAS = {"serve": "all", "dev": "dev"}  # dev holds all of serve
TORCH_INDEX = {"cpu": "https://download.pytorch.org/whl/cpu"}
PYTHON = VENV / "bin" / "python"


def main(args: list[str]) -> int:
    if not args or args[0] not in EXTRAS:
        print(__doc__, file=sys.stderr)
        return 2
    which, torch = args[0], args[2] if args[1:2] == ["--torch"] and len(args) > 2 else ""
    if torch not in ("", *TORCH_INDEX):
        print(f"TORCH={torch}: expected {' or '.join(TORCH_INDEX)}.", file=sys.stderr)
        return 2
    wanted = fingerprint()
    done = installed()
    if PYTHON.exists() and done.get("hash") == wanted and which in done.get("sets", "").split():
        if torch == done.get("torch", "") or not torch:
            return 0
    return install(which, torch or done.get("torch", ""), wanted)


def fingerprint() -> str:
    """Hash of all that decides what gets installed."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def installed() -> dict[str, str]:
    """What the stamp says: hash, sets, torch. Empty without one."""
    try:
        lines = (VENV / "quire-setup").read_text().splitlines()
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in lines if "=" in line)


def install(which: str, torch: str, wanted: str) -> int:
    started = time.monotonic()
    steps: list[tuple[str, list[str]]] = []
    if not PYTHON.exists():
        steps.append(("virtual environment in .venv", [sys.executable, "-m", "venv", str(VENV)]))
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    pip += ["--no-input", "-c", str(ROOT / "constraints.txt")]
    # torch first and alone: whatever comes later finds it there and pulls no other build
    # (--no-deps: PyTorch's own index lacks our versions of what torch needs; they come last)
    index = ["--no-deps", "--index-url", TORCH_INDEX[torch]] if torch else []
    if torch and PYTHON.exists() and installed().get("torch") != torch:
        index.append("--force-reinstall")  # pip takes another build of a version for the same
    pin = _pin("torch")
    steps += [
        ("build tools", [*pip, "hatchling", "editables"]),
        (f"PyTorch {pin} {torch}".strip(), [*pip, *index, f"torch=={pin}"]),
        ("the rest", [*pip, "--no-build-isolation", "-e", f"{ROOT}[{EXTRAS[which]}]"]),
    ]
    print(f"Setting up Quire ({which}) with {sys.executable}; the log is {LOG}", flush=True)
    for number, (title, command) in enumerate(steps, 1):
        if not _step(f"[{number}/{len(steps)}] {title}", command):
            return 1
    sets = "serve dev" if which == "dev" else "serve"
    (VENV / "quire-setup").write_text(f"hash={wanted}\nsets={sets}\ntorch={torch}\n")
    print(f"Set up in {time.monotonic() - started:.0f} s.", flush=True)
    return 0


def _pin(package: str) -> str:
    match = re.search(rf"^{package}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if not match:
        raise SystemExit(f"constraints.txt has no line {package}==...")
    return match[1]


def _step(title: str, command: list[str]) -> bool:
    """Run one command, output to the log, progress to the terminal. False when it failed."""
    begin = time.monotonic()
    progress = _Progress(title)
    # While pip runs, the stamp must not claim anything.
    (VENV / "quire-setup").unlink(missing_ok=True)
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    tail: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            tail = [*tail[-30:], line]
            if LOG.parent.is_dir():
                with LOG.open("a") as log:
                    log.write(line)
            progress.saw(line)
    progress.end(f"{time.monotonic() - begin:.0f} s" if child.returncode == 0 else "failed")
    if child.returncode != 0:
        sys.stderr.writelines(line for line in tail if "WARNING" not in line)
        print(f"{title} failed (status {child.returncode}); all of it is in {LOG}", file=sys.stderr)
    return child.returncode == 0


class _Progress:
    """One line per step: rewritten in place on a terminal, else a line every 10 s."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._note = ""
        self._begin = time.monotonic()
        self._tty = sys.stdout.isatty()
        self._over = threading.Event()
        print(title, end="" if self._tty else " ...\n", flush=True)
        self._thread = threading.Thread(target=self._tick, daemon=True)
        self._thread.start()

    def saw(self, line: str) -> None:
        """Take one line of pip's output; keep what says where it is."""
        match = re.match(r"\s*(Collecting|Downloading|Installing|Building|Processing)\s+(.+)", line)
        if match:
            what = match[2].split("/")[-1] if match[1] == "Processing" else match[2]
            self._note = f"{match[1].lower()} {what.strip()}"[:60]

    def end(self, how: str) -> None:
        self._over.set()
        self._thread.join()
        print(f"\r\033[K{self._title}: {how}" if self._tty else f"{self._title}: {how}", flush=True)

    def _tick(self) -> None:
        while not self._over.wait(0.5 if self._tty else 10):
            line = f"{self._title}  {time.monotonic() - self._begin:.0f} s  {self._note}"
            print(f"\r\033[K{line[:100]}" if self._tty else line, end="" if self._tty else "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
