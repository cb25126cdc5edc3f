"""compose.yaml without containers: its own commands, environment and health checks, as local
processes. Service names become 127.0.0.1 and every port a free one; nothing else is changed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from flow.processes import ROOT, Process, clean_environ, free_ports, get, post
from quire.config import EngineConfig

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("gateway", "scheduler", "worker")
PORTS = ("8000", "50051", "5557", "9101", "9102")


def interpolated(value: object) -> str:
    """${NAME:-default} becomes the default, as without a variable."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))


class Local:
    """Translates what compose.yaml says to this machine."""

    def __init__(self) -> None:
        self.ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))

    def text(self, value: object) -> str:
        found = interpolated(value)
        found = re.sub(r"\b(gateway|scheduler|worker):(?=\d)", "127.0.0.1:", found)
        return re.sub(r"\b\d{4,5}\b", lambda m: self.ports.get(m[0], m[0]), found)

    def environ(self, service: str) -> dict[str, str]:
        given = {k: self.text(v) for k, v in SERVICES[service]["environment"].items()}
        return clean_environ(**{k: v for k, v in given.items() if k != "HF_TOKEN"})

    def command(self, service: str) -> list[str]:
        """The image's entry point with compose's command."""
        assert 'ENTRYPOINT ["quire"]' in DOCKERFILE
        return [sys.executable, "-P", "-m", "quire.cli", *SERVICES[service]["command"]]

    def healthy(self, service: str) -> bool:
        test = SERVICES[service]["healthcheck"]["test"]
        assert test[:2] == ["CMD", "python"]
        command = [sys.executable, *map(self.text, test[2:])]
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def test_compose_follows_the_schema() -> None:
    subprocess.run(
        [sys.executable, "-P", "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec",
         str(ROOT / "compose.yaml")],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip


def test_what_a_service_waits_for_does_not_wait_for_it() -> None:
    waits = {name: set(s.get("depends_on", {})) for name, s in SERVICES.items()}

    def reached(name: str, path: tuple[str, ...] = ()) -> None:
        assert name not in path, " -> ".join((*path, name))
        for other in waits[name]:
            reached(other, (*path, name))

    for name in waits:
        reached(name)
    for service in SERVICES.values():
        for other, how in service.get("depends_on", {}).items():
            assert "healthcheck" in SERVICES[other]
            # a worker of one profile is absent in the other
            of_a_profile = bool(SERVICES[other].get("profiles"))
            assert how["condition"] == ("service_started" if of_a_profile else "service_healthy")
            assert how.get("required", True) is not of_a_profile


def test_services_are_started_again_and_watched() -> None:
    for name in (*OURS, "worker-gpu"):
        assert SERVICES[name]["restart"] == "unless-stopped"
        assert SERVICES[name]["healthcheck"]["test"]


def test_the_gateway_is_stopped_first_and_has_time_to_drain() -> None:
    """Compose stops in the reverse order of depends_on."""
    assert {"scheduler", "worker", "worker-gpu"} == set(SERVICES["gateway"]["depends_on"])
    grace = float(SERVICES["gateway"]["stop_grace_period"].removesuffix("s"))
    assert grace > EngineConfig().drain_timeout


def test_profiles_and_their_default() -> None:
    profiles = {name: s.get("profiles", []) for name, s in SERVICES.items()}
    assert profiles["gateway"] == profiles["scheduler"] == []
    assert (profiles["worker"], profiles["worker-gpu"]) == (["cpu"], ["gpu"])
    assert profiles["prometheus"] == ["monitoring"]
    assert "COMPOSE_PROFILES=cpu" in (ROOT / ".env").read_text()


def test_containers_have_no_rights_they_do_not_need() -> None:
    for name in (*OURS, "worker-gpu"):
        service = SERVICES[name]
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S))
    for target in (*OURS, "all"):
        assert "USER quire" in stages[target]
    assert list(stages)[-1] == "all" and 'CMD ["serve"]' in stages["all"]
    assert "torch" not in stages["gateway"] + stages["scheduler"] + stages["base"]


def test_the_image_takes_the_pinned_torch() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert re.search(r"torch==\S+", DOCKERFILE)[0] in pins  # type: ignore[index]


def test_prometheus_scrapes_what_the_services_offer() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())
    targets = {t for job in config["scrape_configs"] for t in job["static_configs"][0]["targets"]}
    assert targets == {"gateway:8000", "scheduler:9101", "worker:9102"}


@pytest.mark.timeout(240)
def test_the_three_services_become_healthy_and_answer(tmp_path: Path) -> None:
    local = Local()
    order = ["scheduler", "worker", "gateway"]  # what depends_on allows
    with ExitStack() as stack:
        processes = {}
        for name in order:
            process = Process(local.command(name), local.environ(name))
            processes[name] = stack.enter_context(process)
            if name == "scheduler":  # the others wait for it
                wait_healthy(local, processes, ["scheduler"])
        wait_healthy(local, processes, order)
        port = int(local.ports["8000"])
        body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "ignore_eos": True}
        status, answer = post(port, "/v1/completions", json.dumps(body).encode())
        assert status == 200, answer
        assert json.loads(answer)["usage"]["completion_tokens"] == 8
        for target in ("8000", "9101", "9102"):
            status, page = get(int(local.ports[target]), "/metrics")
            assert status == 200 and b"quire_" in page


def wait_healthy(local: Local, processes: dict[str, Process], names: list[str]) -> None:
    deadline = time.monotonic() + 150
    waiting = list(names)
    while waiting:
        waiting = [name for name in waiting if not local.healthy(name)]
        for name, process in processes.items():
            assert process.popen.poll() is None, f"{name} ended:\n{process.output}"
        assert time.monotonic() < deadline, [processes[n].output for n in waiting]
