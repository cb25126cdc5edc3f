"""The journal reproduces a run: its plans, given to a fresh worker, bring the same results."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import openai
import pytest

from flow.processes import QUIRE, Process, addresses, children, clean_environ, run
from quire import LLM, SamplingParams
from quire.v1 import step_pb2
from quire_scheduler import journal
from quire_scheduler.segment import Direction, Record, Segment, beginning, encode, segments

pytestmark = pytest.mark.timeout(300)
SETTINGS = {"kv_cache_memory_bytes": 16 << 20, "max_num_batched_tokens": 48}


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Segments of a few kilobytes, so that a short run fills several."""
    monkeypatch.setattr(journal, "MAX_SEGMENT_BYTES", 12 << 10)
    yield


def record(folder: Path, **settings: object) -> list[list[int]]:
    """A load of greedy, seeded and penalised requests with shared prefixes; its tokens."""
    shared = list(range(10, 60))
    prompts = [{"prompt_token_ids": [*shared, n, n + 1]} for n in range(100, 106)]
    prompts += [{"prompt_token_ids": list(range(10, 10 + 17 * n))} for n in range(1, 7)]
    params = [
        SamplingParams(
            temperature=n % 2, seed=n, max_tokens=40, logprobs=n % 3 or None, ignore_eos=True,
            repetition_penalty=1.0 + 0.1 * (n % 2),
        )
        for n in range(12)
    ]  # fmt: skip
    with LLM("demo", journal=folder, **SETTINGS, **settings) as llm:
        outputs = llm.generate(prompts, params)
        outputs += llm.generate(prompts, params)  # prefix hits
        llm.embed(prompts[:2])
        llm.check()
    return [list(output.outputs[0].token_ids) for output in outputs]


def alter(path: Path, change) -> None:
    """Write the segment anew with every record passed through `change`, checksums and all."""
    segment = Segment(path)
    records = [change(r) for r in segment]
    path.write_bytes(beginning(segment.header) + b"".join(map(encode, records)))


def test_replay_lands_on_the_same_tokens_and_names_what_differs(
    tmp_path: Path, small_segments: None
) -> None:
    folder = tmp_path / "journal"
    tokens = record(folder)
    assert tokens[:12] == tokens[12:]
    found = segments(folder)
    assert len(found) > 4
    done = run("replay", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("tokens: all equal\n")

    later = found[2]  # begins in the middle of the run, and is replayed by itself
    whole = later.read_bytes()
    assert run("replay", str(later)).returncode == 0

    at = len(whole) * 3 // 4
    later.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
    done = run("replay", str(later))
    assert done.returncode == 1
    assert f"{later.name} is damaged at byte" in done.stdout
    assert "of epoch" in done.stdout and "as written" in done.stdout

    later.write_bytes(whole)
    altered: list[step_pb2.StepResult] = []

    def other_token(r: Record) -> Record:
        message = step_pb2.WorkerFrame()
        if r.direction is Direction.WORKER and len(altered) < 6:
            message.ParseFromString(r.frame)
            if message.result.token_ids:
                altered.append(message.result)
        if len(altered) != 6 or not message.result.token_ids:
            return r
        ids = message.result.token_ids
        message.result.token_ids = bytes([ids[0] ^ 1]) + ids[1:]
        altered.append(message.result)
        return r._replace(frame=message.SerializeToString())

    alter(later, other_token)
    done = run("replay", str(later))
    assert done.returncode == 1
    assert f"{later.name}, epoch {altered[5].epoch}, seq {altered[5].seq}: slot " in done.stdout
    assert "token: recorded" in done.stdout and "(request " in done.stdout


@pytest.mark.parametrize("privacy", ["hashed", "none"])
def test_a_journal_without_prompts_is_refused(tmp_path: Path, privacy: str) -> None:
    folder = tmp_path / "journal"
    with LLM("demo", journal=folder, journal_privacy=privacy, **SETTINGS) as llm:
        llm.generate("Once upon a time", SamplingParams(max_tokens=4))
    done = run("replay", str(folder))
    assert done.returncode == 2
    assert privacy in done.stderr and "can't be replayed" in done.stderr


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    with LLM("demo", journal=folder, **SETTINGS) as llm:
        llm.generate("Once upon a time", SamplingParams(max_tokens=4))
    done = run("replay", str(folder), "--model", "models/demo-draft")
    assert done.returncode == 2
    assert "model_digest" in done.stderr
    (path,) = segments(folder)
    segment = Segment(path)
    header = dataclasses.replace(segment.header, model="no/such")
    path.write_bytes(beginning(header) + b"".join(map(encode, segment)))
    assert run("replay", str(folder)).returncode == 2
    assert run("replay", str(folder), "--model", "demo").returncode == 0


def ask(client: openai.OpenAI, number: int) -> list[tuple[str, str | None]]:
    """One request of a mixed load: greedy, seeded, n = 2, stop strings, cancelled on the way."""
    request = {
        "model": "demo",
        "prompt": "Once upon a time there was a little " + ("fox", "girl", "boy")[number % 3],
        "max_tokens": 60 + number % 5,
        "temperature": number % 2,
        "seed": number,
        "n": 1 + (number % 4 == 3),
        "stop": [" and", "!"] if number % 5 == 4 else None,
        "logprobs": 5 if number % 2 else None,
        "stream": True,
        "extra_body": {"ignore_eos": number % 3 > 0},
    }
    texts: dict[int, tuple[str, str | None]] = {}
    with client.completions.create(**request) as stream:
        for count, chunk in enumerate(stream):
            for choice in chunk.choices:
                text, reason = texts.get(choice.index, ("", None))
                texts[choice.index] = (text + choice.text, choice.finish_reason or reason)
            if number % 7 == 6 and count == 12:
                return []  # the client goes away
    return [texts[index] for index in sorted(texts)]


def load(url: str, killed: Callable[[], None] | None = None) -> list[list[tuple[str, str | None]]]:
    """40 requests of 8 clients; `killed` is called once half of them are done."""
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        jobs = [pool.submit(ask, client, number) for number in range(40)]
        for done, _ in enumerate(as_completed(jobs)):
            if done == 20 and killed is not None:
                killed()
        return [job.result() for job in jobs]


def test_a_mixed_load_with_a_killed_worker_replays(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    environ = addresses()
    flags = ["--journal", str(folder), "--journal-max-bytes", "1MiB"]  # segments of 128 KiB
    with Process([*QUIRE, "serve", "demo", *flags], clean_environ(**environ)) as process:
        process.line("Ready in", timeout_s=90)
        url = f"http://127.0.0.1:{environ['QUIRE_PORT']}"

        def kill_worker() -> None:
            (pid,) = (p for p in children(process.pid) if "worker" in command_of(p))
            os.kill(pid, signal.SIGKILL)

        undisturbed = load(url)
        assert load(url, kill_worker) == undisturbed
    found = segments(folder)
    assert len(found) >= 3
    assert sum(path.stat().st_size for path in found) <= 1 << 20

    done = run("replay", str(folder), timeout_s=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("tokens: all equal\n")

    shown = [json.loads(line) for line in show(folder, "--json").splitlines()]
    hellos = {event["worker_epoch"] for event in shown if event["kind"] == "hello"}
    assert len(hellos) == 2
    assert sum(event["kind"] == "segment" for event in shown) == len(found)
    times = [event["t"] for event in shown]
    assert times == sorted(times)
    admit = next(a for event in shown for a in event.get("admits", ()))
    mine = show(folder, "--request", admit["request"]).splitlines()
    assert admit["request"] in mine[0] and 1 < len(mine) < len(shown)

    lines = [json.loads(line) for line in run("journal", "trace", str(folder)).stdout.splitlines()]
    complete = [line for line in lines if line["num_output_tokens"] >= 60]
    assert len(lines) <= 100 and len(complete) >= 40
    assert all(line["num_prompt_tokens"] == len(line["prompt_token_ids"]) for line in lines)
    assert [line["arrival_s"] for line in lines] == sorted(line["arrival_s"] for line in lines)


def show(folder: Path, *options: str) -> str:
    done = run("journal", "show", str(folder), *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
