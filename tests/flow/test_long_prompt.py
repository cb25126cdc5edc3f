"""A prompt of 32k tokens is served whole by real processes while other streams decode."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

from fakes.checkpoints import make_checkpoint
from flow.processes import QUIRE, Process, addresses, clean_environ, post

LENGTH = 32_768


def test_a_prompt_of_32k_tokens_while_others_decode(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path / "long", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        hidden_size=32, max_position_embeddings=40_960,
    )  # fmt: skip
    environ = addresses()
    port = int(environ["QUIRE_PORT"])
    command = [*QUIRE, "serve", str(folder), "--served-model-name", "m"]
    command += ["--max-num-batched-tokens", "2048"]  # the prompt takes 16 steps or more
    done, begun = threading.Event(), threading.Barrier(4)

    def stream(number: int) -> int:
        """Tokens that came from the long prompt's arrival to its answer."""
        body = {
            "prompt": [5 + number], "max_tokens": 30_000, "ignore_eos": True, "stream": True,
        }  # fmt: skip
        count = 0
        with closing(HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            connection.request(
                "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            assert answer.status == 200
            while not answer.readline().startswith(b"data: {"):
                pass
            begun.wait(60)
            while not done.is_set():
                count += answer.readline().startswith(b"data: {")
        return count

    with Process([*command], clean_environ(**environ)) as process, ThreadPoolExecutor(3) as pool:
        process.line("Ready in", timeout_s=120)
        streams = [pool.submit(stream, number) for number in range(3)]
        prompt = [(7 * i) % 400 + 3 for i in range(LENGTH)]
        body = {"prompt": prompt, "max_tokens": 4, "ignore_eos": True, "temperature": 0}
        try:
            begun.wait(60)
            status, answer = post(port, "/v1/completions", json.dumps(body).encode(), 300)
        finally:
            done.set()
        assert status == 200
        assert json.loads(answer)["usage"] == {
            "prompt_tokens": LENGTH, "completion_tokens": 4, "total_tokens": LENGTH + 4,
            "prompt_tokens_details": {"cached_tokens": 0},
        }  # fmt: skip
        assert min(future.result() for future in streams) >= 10
