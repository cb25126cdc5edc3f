"""Builders for scheduler tests: a client that collects, an engine with simulated workers."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import zmq

from fakes.worker import FakeWorker, Options, oracle
from quire.config import EngineConfig
from quire.errors import QuireError
from quire.link import QueueLink
from quire.sampling import SamplingParams
from quire_scheduler.engine import Engine, Submission
from quire_scheduler.outputs import Outputs

REASONS = {0: None, 1: "stop", 2: "length", 3: "abort", 4: "error"}


@dataclass
class Stream:
    """What one request has got so far."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    stop_token_id: int = -1
    num_cached_tokens: int = 0
    deaths: int = 0
    error: QuireError | None = None
    logprob_counts: list[int] = field(default_factory=list)
    first_index: int | None = None
    embedding: list[float] | None = None


class Collector:
    """A client. Asserts on the way that rows are in order, complete and never after a finish."""

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}
        self.num_deliveries = 0

    def __getitem__(self, handle: int) -> Stream:
        return self.streams.setdefault(handle, Stream())

    def deliver(self, outputs: Outputs) -> None:
        self.num_deliveries += 1
        failures = {f.handle: f.error for f in outputs.failures}
        pooled = {p.handle: p.embedding.tolist() for p in outputs.pooled}
        at = 0
        for row in range(len(outputs)):
            stream = self[int(outputs.handles[row])]
            assert stream.reason is None, "a row after the finish"
            n = int(outputs.num_tokens[row])
            first = int(outputs.first_indices[row])
            if stream.first_index is None:
                stream.first_index = first
            if n:
                assert first == stream.first_index + len(stream.tokens), "a gap or a duplicate"
            stream.tokens += outputs.token_ids[at : at + n].tolist()
            if outputs.logprobs is not None:
                stream.logprob_counts += outputs.logprobs.counts[at : at + n].tolist()
            at += n
            stream.reason = REASONS[int(outputs.finish_reasons[row])]
            stream.stop_token_id = int(outputs.stop_token_ids[row])
            stream.num_cached_tokens = int(outputs.num_cached_tokens[row])
            stream.deaths = int(outputs.deaths[row])
            stream.embedding = pooled.get(int(outputs.handles[row]))
            if stream.reason == "error":
                stream.error = failures[int(outputs.handles[row])]

    @property
    def finished(self) -> int:
        return sum(1 for s in self.streams.values() if s.reason is not None)


class Rig:
    """An engine turned by hand, with simulated workers pumped by hand: no threads, no waiting."""

    def __init__(self, options: Options | None = None, *, hello: bool = True, **config: object):
        self.options = options or Options()
        config.setdefault("block_size", self.options.block_size)
        self.config = EngineConfig(**config)  # type: ignore[arg-type]
        self.link = QueueLink()
        self.now = 100.0
        self.engine = Engine(self.config, self.link, clock=lambda: self.now)
        self.client = Collector()
        self.worker = FakeWorker(self.link.worker(), self.options)
        self.num_submitted = 0
        if hello:
            self.worker.hello()
            self.engine.turn(0)

    def submit(self, prompt: list[int] | np.ndarray, handle: int | None = None, **rest) -> int:
        """One request; keyword arguments of SamplingParams or Submission."""
        handle = self.num_submitted if handle is None else handle
        self.num_submitted += 1
        fields = {
            k: rest.pop(k)
            for k in list(rest)
            if k in Submission.__dataclass_fields__  # type: ignore[attr-defined]
        }
        client = rest.pop("client", self.client)
        rest.setdefault("seed", 7)
        rest.setdefault("max_tokens", 8)
        if "output_token_ids" in fields:
            fields["output_token_ids"] = np.array(fields["output_token_ids"], np.int32)
        self.engine.submit(
            client,
            Submission(
                handle=handle,
                prompt_token_ids=np.array(prompt, np.int32),
                params=SamplingParams(**rest),
                request_id=fields.pop("request_id", f"r{handle}"),
                **fields,
            ),
        )
        return handle

    def turn(self, worker_frames: int = 1000) -> None:
        """One pass of the engine, then one of the worker."""
        self.now += 0.001
        self.engine.turn(0)
        self.worker.pump(worker_frames)

    def run(self, turns: int = 5000, *, until: int | None = None) -> None:
        """Until all submitted requests (or `until` of them) are finished; checks the books."""
        want = self.num_submitted if until is None else until
        for _ in range(turns):
            if self.client.finished >= want:
                break
            self.turn()
        assert self.client.finished >= want, f"{self.client.finished} of {want} finished"
        self.settle()

    def settle(self) -> None:
        """Let plans in flight come home, then check everything."""
        for _ in range(6):
            self.turn()
        assert self.worker.violations == []
        self.engine.check()

    def expected(self, prompt: list[int], **rest) -> tuple[list[int], str]:
        o = self.options
        rest.setdefault("seed", 7)
        rest.setdefault("max_tokens", 8)
        model = self.engine.model()
        return oracle(
            prompt,
            max_model_len=model.max_model_len if model else o.max_model_len,
            vocab_size=o.vocab_size,
            eos_every=o.eos_every,
            eos=o.eos,
            **rest,
        )


class Waiter(Collector):
    def __init__(self, want: int) -> None:
        super().__init__()
        self.want, self.done = want, threading.Event()

    def deliver(self, outputs):
        super().deliver(outputs)
        if self.finished >= self.want:
            self.done.set()


def submission(handle: int, prompt: list[int], **params) -> Submission:
    params.setdefault("seed", 7)
    return Submission(
        handle=handle,
        prompt_token_ids=np.array(prompt, np.int32),
        params=SamplingParams(**params),
    )


class DealerLink:
    """A worker's end over a plain DEALER, for one thread."""

    def __init__(self, context: zmq.Context, endpoint: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(endpoint)

    def send(self, frame: bytes) -> None:
        self.socket.send(frame)

    def recv(self, timeout_s: float) -> bytes | None:
        return self.socket.recv() if self.socket.poll(int(timeout_s * 1000)) else None

    def close(self) -> None:
        self.socket.close()
