"""The command line: messages, exit statuses, and the plan, without a model being loaded."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from flow.processes import QUIRE, addresses, clean_environ, free_ports, run
from quire.config import settings
from unit.quire import checkpoints


@pytest.fixture
def environ() -> dict[str, str]:
    return clean_environ(**addresses())


@pytest.fixture
def listener() -> Iterator[int]:
    """A port that somebody (this process) listens on."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


def test_version() -> None:
    assert re.fullmatch(r"quire \d+\.\d+\.\d+\n", run("--version").stdout)


@pytest.mark.parametrize("words", [["--help"], ["help"], [], ["serve", "--help"], ["chat", "-h"]])
def test_help_fits_one_screen(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 0
    assert 5 < len(done.stdout.splitlines()) <= 45
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_full_help_lists_every_setting_with_its_variable() -> None:
    text = run("serve", "--help=all").stdout
    for f in settings():
        assert f.name.replace("_", "-") in text
        assert f"QUIRE_{f.name.upper()}" in text
    assert "LLM_ENGINE_PORT" in text and "--mem-fraction-static" in text


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["serve", "--max-model-length", "5"], "Did you mean --max-model-len?"),
        (["generate", "--promt", "x"], "Did you mean --prompt?"),
        (["serv"], "Did you mean serve?"),
        (["serve", "a", "b"], "does not take 'b'"),
        (["serve", "demo", "--model", "other"], "two models"),
        (["serve", "--port"], "--port needs a value"),
        (["serve", "--dry-run=yes"], "takes no value"),
        (["serve", "--port", "http"], "can't use 'http'"),
        (["serve", "--device", "tpu"], "not one of auto, cpu, cuda"),
        (["serve", "--tensor-parallel-size", "2"], "between 1 and 1"),
        (["serve", "--config", "/nope.toml"], "/nope.toml"),
        (["serve", "--chat-template", "/nope"], "no such file"),
        (["serve", "--engine-address", "nowhere"], "expected host:port"),
        (["worker", "--rank", "x"], "--rank must be an integer"),
        (["worker", "--rank", "-1"], "--rank must be between"),
        (["--port", "5"], "the command comes first"),
        (["generate"], "needs --prompt"),
        (["generate", "--prompt", "x", "--max-tokens", "0"], "--max-tokens must be between"),
        (["generate", "--prompt", "x", "--temperature", "nan"], "--temperature must be between"),
        (["chat", "--url", "ftp://x"], "expected something like http://"),
        (["serve", "--help=most"], "expected --help or --help=all"),
    ],
)
def test_wrong_words_are_answered_with_what_to_do(
    words: list[str], part: str, environ: dict[str, str]
) -> None:
    done = run(*words, environ=environ)
    assert done.returncode == 2
    assert part in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_unknown_variable_is_refused() -> None:
    done = run("serve", "--dry-run", environ=clean_environ(QUIRE_PROT="1"))
    assert done.returncode == 2
    assert "QUIRE_PORT" in done.stderr


def test_print_config_shows_values_and_sources(tmp_path: Path) -> None:
    (tmp_path / "q.toml").write_text("[cache]\nblock_size = 32\n")
    words = ["serve", "demo", "--print-config", "--config", str(tmp_path / "q.toml")]
    environ = clean_environ(QUIRE_PORT="9", QUIRE_API_KEY="hush")
    text = run(*words, "--dtype", "float32", environ=environ).stdout
    assert "port = 9  (env QUIRE_PORT)" in text
    assert "dtype = 'float32'  (flag --dtype)" in text
    assert "block_size = 32  (file " in text
    assert "host = '127.0.0.1'  (default)" in text
    assert "hush" not in text


def test_dry_run_is_the_same_by_word_and_by_flag(environ: dict[str, str]) -> None:
    plans = [
        run(*words, "--dry-run", environ=environ)
        for words in (["serve", "demo"], ["serve", "--model", "demo"], ["serve"])
    ]
    assert [p.returncode for p in plans] == [0, 0, 0]
    assert plans[0].stdout == plans[1].stdout == plans[2].stdout
    assert "Qwen3ForCausalLM" in plans[0].stdout
    assert f"http://127.0.0.1:{environ['QUIRE_PORT']}" in plans[0].stdout


def test_dry_run_takes_other_spellings(environ: dict[str, str]) -> None:
    words = "--model-path demo --tp-size 1 --mem-fraction-static 0.8 --dry-run".split()
    assert run("serve", *words, environ=environ).returncode == 0


def test_port_in_use_is_found_before_anything_is_loaded(listener: int) -> None:
    begin = time.monotonic()
    done = run("serve", "--port", str(listener))
    assert time.monotonic() - begin < 10  # alone it takes 0.2 s
    assert done.returncode == 98
    assert done.stderr.startswith("Address already in use: port ")
    assert str(listener) in done.stderr and f"process {os.getpid()}" in done.stderr
    assert done.stdout == ""


def test_an_inner_address_that_was_given_is_not_moved(listener: int) -> None:
    environ = clean_environ(QUIRE_PORT=str(free_ports(1)[0]))
    words = ["serve", "--dry-run", "--engine-address", f"127.0.0.1:{listener}"]
    done = run(*words, environ=environ)
    assert done.returncode == 98
    assert "--engine-address" in done.stderr


def test_a_host_that_is_not_ours_is_refused() -> None:
    done = run("serve", "--host", "192.0.2.1", "--dry-run")
    assert done.returncode == 2
    assert "--host '192.0.2.1'" in done.stderr


def test_memory_is_checked_before_loading(environ: dict[str, str]) -> None:
    done = run("serve", "--device", "cpu", "--kv-cache-memory-bytes", "60TiB", environ=environ)
    assert done.returncode == 2
    assert done.stderr.startswith("Resource error: ")
    assert "would fit" in done.stderr


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda p: (p / "model.safetensors").write_bytes(b"x"), "model.safetensors is damaged"),
        (lambda p: (p / "model.safetensors").unlink(), "no *.safetensors"),
        (lambda p: (p / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "tokenizer.json").unlink(), "no tokenizer.json"),
        (
            lambda p: (p / "config.json").write_text(json.dumps({"architectures": ["Oops"]})),
            "unknown architecture Oops; supported: LlamaForCausalLM",
        ),
    ],
)
def test_a_damaged_model_is_named(
    tmp_path: Path, environ: dict[str, str], damage, part: str
) -> None:
    damage(checkpoints.folder(tmp_path))
    done = run("serve", str(tmp_path), environ=environ)
    assert done.returncode == 2
    assert done.stderr.startswith("Model error: ")
    assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("model", ["/nope", "dmo", "nobody/no-such-model"])
def test_a_missing_model_is_an_error_without_network(model: str, environ: dict[str, str]) -> None:
    begin = time.monotonic()
    done = run("serve", model, environ=environ)
    assert done.returncode == 2
    assert done.stderr.startswith("Model error: ")
    assert "Traceback" not in done.stderr
    assert time.monotonic() - begin < 15  # alone: below 1 s


def test_output_into_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*QUIRE, "serve", "--help=all"], stdout=writer, stderr=subprocess.PIPE, timeout=60
        )
    finally:
        os.close(writer)
    assert b"Traceback" not in done.stderr
