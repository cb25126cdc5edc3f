"""The process: ready, SIGTERM, locks, taken ports. Started as `quire scheduler` would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
import zmq
from sched_helpers import DealerLink

from fakes.worker import FakeWorker, Options
from quire.v1 import common_pb2, engine_pb2, engine_pb2_grpc

SCRIPT = """
import sys
from quire.config import EngineConfig
from quire_scheduler.main import run
sys.exit(run(EngineConfig(engine_address=sys.argv[1], step_address=sys.argv[2],
                          scheduler_metrics_port=int(sys.argv[3]), drain_timeout=10.0)))
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(engine: int, step: int, metrics: int = 0, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", SCRIPT, f"127.0.0.1:{engine}", f"127.0.0.1:{step}",
         str(metrics)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **env},
    )  # fmt: skip


@pytest.fixture
def lock_folder(tmp_path: Path) -> dict[str, str]:
    return {"TMPDIR": str(tmp_path)}


def channel_to(port: int) -> grpc.Channel:
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    grpc.channel_ready_future(channel).result(timeout=20)
    return channel


def test_sigterm_lets_running_requests_end_and_exits_0(lock_folder):
    engine, step = free_port(), free_port()
    process = start(engine, step, **lock_folder)
    context = zmq.Context()
    worker = None
    try:
        with channel_to(engine) as channel:
            stub = engine_pb2_grpc.EngineServiceStub(channel)
            link = DealerLink(context, f"tcp://127.0.0.1:{step}")
            worker = FakeWorker(link, Options(latency=lambda n: 0.005))
            worker.start()
            deadline = time.monotonic() + 10
            while not stub.GetModel(engine_pb2.GetModelRequest()).ready:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            request = engine_pb2.GenerateRequest(
                prompt_token_ids=[5],
                sampling_params=common_pb2.SamplingParams(max_tokens=100),
            )
            call = stub.Generate(request)
            count = len(next(call).token_ids)
            process.send_signal(signal.SIGTERM)
            count += sum(len(answer.token_ids) for answer in call)
            assert count == 100
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.communicate()
        if worker is not None:
            worker.stop()
        context.destroy(0)


def test_sigterm_before_any_worker_exits_0(lock_folder):
    engine = free_port()
    process = start(engine, free_port(), **lock_folder)
    try:
        channel_to(engine).close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.communicate()


def test_a_second_scheduler_on_an_address_is_turned_away(lock_folder):
    engine, step = free_port(), free_port()
    process = start(engine, step, **lock_folder)
    try:
        channel_to(engine).close()
        for ports in ((free_port(), step), (engine, free_port())):
            second = start(*ports, **lock_folder)
            _, text = second.communicate(timeout=20)
            assert second.returncode == 98
            assert text.startswith("Address already in use: another scheduler")
            assert str(process.pid) in text and "Traceback" not in text
        third = start(free_port(), free_port(), engine, **lock_folder)
        _, text = third.communicate(timeout=20)
        assert third.returncode == 98 and "--scheduler-metrics-port" in text
    finally:
        process.kill()
        process.communicate()
    again = start(engine, step, **lock_folder)  # the lock of a killed one is free
    try:
        channel_to(engine).close()
    finally:
        again.kill()
        again.communicate()


@pytest.mark.parametrize("flag", ["--engine-address", "--step-address"])
def test_a_port_taken_by_somebody_else_is_an_error(flag, lock_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = (port, free_port()) if flag == "--engine-address" else (free_port(), port)
        process = start(*ports, **lock_folder)
        _, text = process.communicate(timeout=20)
    assert process.returncode == 98
    assert flag in text and text.count("\n") == 1


def test_an_engine_that_crashes_ends_the_process_with_status_1(lock_folder):
    crash = "import quire_scheduler.engine as e\ne.Engine._take_inbox = lambda self: 1 / 0\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", crash + SCRIPT, f"127.0.0.1:{free_port()}",
         f"127.0.0.1:{free_port()}", "0"],
        stderr=subprocess.PIPE, text=True, timeout=30, env={**os.environ, **lock_folder},
    )  # fmt: skip
    assert done.returncode == 1
    assert "the engine stopped: ZeroDivisionError" in done.stderr
