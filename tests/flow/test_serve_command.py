"""`quire serve` with the real services: ready line, restarts, signals, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flow.processes import (
    QUIRE,
    Process,
    addresses,
    alive,
    clean_environ,
    descendants,
    free_ports,
    get,
    post,
    run,
    until,
)
from unit.quire import checkpoints

ASK = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True}


def serve(*words: str, **environ: str) -> Process:
    return Process([*QUIRE, "serve", *words], clean_environ(**{**addresses(), **environ}))


def port_of(process: Process) -> int:
    return int(process.environ["QUIRE_PORT"])


def ask(port: int, **fields: object) -> dict:
    status, body = post(port, "/v1/completions", json.dumps({**ASK, **fields}).encode())
    assert status == 200, body
    return json.loads(body)


def services_of(process: Process) -> dict[str, int]:
    """Pids of the running services by name."""
    found = {}
    for pid in descendants(process.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        for name in ("gateway", "scheduler", "worker"):
            if name in words:
                found[name] = pid
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with serve(QUIRE_API_KEY="hush-hush", QUIRE_LOG_FORMAT="text") as process:
        process.line("Ready in", 100)
        yield process


def test_one_ready_line_names_the_url_and_the_time(server: Process) -> None:
    ready = [line for line in server.lines if line.startswith("Ready in ")]
    assert len(ready) == 1
    url = f"http://127.0.0.1:{port_of(server)}"
    assert re.fullmatch(
        rf"Ready in \d+\.\d s: {url}  \(model demo, cpu, \d+ threads?\)\n", ready[0]
    )


def test_three_processes_and_no_key_in_their_command_lines(server: Process) -> None:
    family = services_of(server)
    assert set(family) == {"gateway", "scheduler", "worker"}
    for pid in (server.pid, *family.values()):
        assert b"hush" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_sockets_listen_on_this_machine_only(server: Process) -> None:
    inodes = set()
    for pid in services_of(server).values():
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(handle))
            except OSError:
                continue
    count = 0
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            cells = row.split()
            if cells[3] == "0A" and f"socket:[{cells[9]}]" in inodes:
                count += 1
                address = cells[1].rpartition(":")[0].removeprefix("0000000000000000FFFF0000")
                assert address in ("0100007F", "00000000000000000000000001000000"), cells[1]
    assert count >= 3


def test_a_second_server_on_the_port_is_refused_and_the_first_unharmed(server: Process) -> None:
    done = run("serve", "--port", str(port_of(server)))
    assert done.returncode == 98
    assert "process" in done.stderr and str(port_of(server)) in done.stderr
    assert get(port_of(server), "/ready")[0] == 200


def test_a_killed_worker_comes_back(server: Process) -> None:
    before = services_of(server)["worker"]
    os.kill(before, signal.SIGKILL)
    server.line("worker was killed by SIGKILL; starting it again")
    until(lambda: services_of(server).get("worker", before) != before)
    until(lambda: get(port_of(server), "/ready")[0] == 200, 60, "ready after the worker's death")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_with_status_0(number: signal.Signals) -> None:
    with serve() as process:
        process.line("Ready in", 100)
        family = descendants(process.pid)
        assert ask(port_of(process))["usage"]["completion_tokens"] == 8
        begin = time.monotonic()
        process.signal(number)
        assert process.wait(20) == 0
        assert time.monotonic() - begin < 10  # idle: alone below 1 s
        assert not [pid for pid in family if alive(pid)]
        assert "Traceback" not in process.output


def test_a_running_stream_is_finished_before_the_end() -> None:
    import http.client

    with serve() as process:
        process.line("Ready in", 100)
        connection = http.client.HTTPConnection("127.0.0.1", port_of(process), timeout=60)
        body = json.dumps({**ASK, "max_tokens": 300, "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        first = answer.readline()
        process.signal(signal.SIGTERM)
        text = first + answer.read()
        connection.close()
        assert text.rstrip().endswith(b"data: [DONE]")
        assert b'"finish_reason":"length"' in text.replace(b" ", b"")
        assert process.wait(30) == 0


def test_services_do_not_outlive_a_killed_supervisor() -> None:
    with serve() as process:
        process.line("Ready in", 100)
        family = descendants(process.pid)
        assert len(family) >= 3
        process.signal(signal.SIGKILL)
        until(lambda: not [pid for pid in family if alive(pid)], 5, "children end")


def test_lines_are_json_when_asked() -> None:
    with serve("--log-format", "json") as process:
        process.line("Ready in", 100)
        lines = [json.loads(line) for line in process.lines]
    assert all({"timestamp", "level", "message", "service"} <= set(line) for line in lines)
    assert any(line.get("url", "").startswith("http://") for line in lines)


def test_taken_inner_addresses_move_by_themselves(server: Process) -> None:
    """The module's server does not hold the default ports, so hold one of them here."""
    import socket

    held = []
    for port in (50051, 5557):
        try:
            held.append(socket.create_server(("127.0.0.1", port)))
        except OSError:
            pass  # somebody else holds it, which serves as well
    environ = clean_environ(QUIRE_PORT=str(free_ports(1)[0]))
    try:
        done = run("serve", "--dry-run", environ=environ)
    finally:
        for one in held:
            one.close()
    assert done.returncode == 0
    assert "Port 50051 is taken; engine address is 127.0.0.1:" in done.stdout
    assert "Port 5557 is taken; step address is 127.0.0.1:" in done.stdout


def test_a_model_that_only_the_worker_can_refuse_is_its_one_line(tmp_path: Path) -> None:
    """The headers look whole; the tensors are not what the architecture needs."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64,
        "vocab_size": 4096, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    folder = checkpoints.folder(tmp_path / "broken", config)
    demo = Path(__file__).resolve().parents[2] / "models" / "demo" / "tokenizer.json"
    (folder / "tokenizer.json").write_bytes(demo.read_bytes())
    with serve(str(folder)) as process:
        assert process.wait(100) == 2
        errors = [line for line in process.lines if line.startswith("Model error: ")]
        assert len(errors) == 1, process.output
        assert "Traceback" not in process.output
        assert "Ready" not in process.output
