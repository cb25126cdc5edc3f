"""Serve, and start again when a source file changes: `scripts/dev.py [serve's flags]`.

Knows no service: it starts and stops `quire serve` as a whole.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from watchfiles import DefaultFilter, watch

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("quire", "gateway", "scheduler", "worker", "kernels", "models/demo")


class Sources(DefaultFilter):
    """Only what a running server has read."""

    def __call__(self, change: object, path: str) -> bool:
        return path.endswith((".py", ".json", ".jinja", ".cpp", ".h")) and super().__call__(
            change, path
        )


def main(args: list[str]) -> int:
    command = [sys.executable, "-P", "-m", "quire.cli", "serve", "--drain-timeout", "1", *args]
    # Ctrl-C reaches only this process; the server is stopped by it, once.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = _start(command)
    try:
        for changes in watch(*(ROOT / f for f in FOLDERS), watch_filter=Sources(), debounce=400):
            names = sorted({Path(path).name for _, path in changes})
            print(f"Changed: {', '.join(names[:5])}; starting again.", flush=True)
            _stop(server)
            server = _start(command)
    except KeyboardInterrupt:
        pass
    finally:
        _stop(server)
    return 0


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    environ = {**os.environ, "QUIRE_SUPERVISED": str(os.getpid())}  # it ends when this ends
    return subprocess.Popen(command, process_group=0, env=environ)


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(10)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
