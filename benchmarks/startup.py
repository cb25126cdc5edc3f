"""Time from the command to ready and to the first token, and each process's memory then.

Starts `quire serve` itself, with a warm environment. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import http.client
import json
import signal
import statistics
import subprocess
import sys
import time

from server import memory_mib, services


def request(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """(status, body); (0, b"") when nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except OSError:
        return 0, b""
    finally:
        connection.close()


def once(model: str, port: int) -> dict[str, float]:
    begin = time.perf_counter()
    command = [sys.executable, "-P", "-m", "quire.cli", "serve", model, "--port", str(port),
               "--served-model-name", "m"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while request(port, "GET", "/ready")[0] != 200:
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}")
            time.sleep(0.01)
        ready = time.perf_counter() - begin
        body = json.dumps({"model": "m", "prompt": [1, 2, 3], "max_tokens": 1}).encode()
        status, _ = request(port, "POST", "/v1/completions", body)
        if status != 200:
            raise RuntimeError(f"the first request got {status}")
        first = time.perf_counter() - begin
        memory = memory_mib(services(server.pid))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    return {"ready_s": ready, "first_token_s": first, **{f"{k}_mib": v for k, v in memory.items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--port", type=int, default=18321)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    runs = [once(args.model, args.port) for _ in range(args.runs)]
    for name in runs[0]:
        values = sorted(run[name] for run in runs)
        print(f"{name:16} min {values[0]:8.2f}  median {statistics.median(values):8.2f}  "
              f"max {values[-1]:8.2f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
