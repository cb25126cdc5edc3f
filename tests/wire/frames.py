"""One readable example of each message on the two wires; test_golden_frames.py pins its bytes.

To change the protocol on purpose: change it here, run this file, review the diff of golden/ and
raise PROTOCOL_VERSION in quire/wire.py if an old reader would misread the new bytes.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import Message

from quire.v1 import common_pb2 as common
from quire.v1 import engine_pb2 as engine
from quire.v1 import step_pb2 as step
from quire.wire import PROTOCOL_VERSION, pack_f32, pack_i32, pack_u32

GOLDEN = Path(__file__).parent / "golden"

NAME_A, NAME_B = bytes(range(16)), bytes(range(16, 32))
TRACE = common.TraceContext(
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", tracestate="quire=1"
)


def sampling() -> common.SamplingParams:
    return common.SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        max_tokens=128,
        min_tokens=2,
        ignore_eos=True,
        stop_token_ids=[7, 11],
        seed=0xFEDCBA9876543210,
        logprobs=3,
        logit_bias=[common.LogitBias(token_id=5, bias=-1.5)],
        allowed_token_ids=[1, 2, 3],
    )


def logprobs() -> common.LogprobColumns:
    return common.LogprobColumns(
        counts=pack_u32([2, 0]),
        token_ids=pack_i32([42, 43]),
        logprobs=pack_f32([-0.5, -1.25]),
        ranks=pack_u32([1, 0]),
    )


def hello() -> step.WorkerFrame:
    return step.WorkerFrame(
        hello=step.Hello(
            protocol_version=PROTOCOL_VERSION,
            rank=0,
            tp_rank=0,
            tp_size=1,
            pp_rank=0,
            pp_size=1,
            worker_epoch=0x0123456789ABCDEF,
            highest_epoch=3,
            last_seq=17,
            model="demo",
            model_digest="00112233445566778899aabbccddeeff",
            dtype="bfloat16",
            kv_dtype="bfloat16",
            block_size=16,
            tiers=[step.TierSize(tier=step.TIER_DEVICE, num_blocks=512, block_bytes=65536)],
            max_slots=256,
            max_model_len=2048,
            vocab_size=4096,
            eos_token_ids=[2, 4],
            device="cpu",
            attention_backend="reference",
            step_costs=[step.StepCost(num_tokens=1, num_context_tokens=16, micros=900)],
            held_block_ids=pack_i32([9, 12]),
            held_block_names=NAME_A + NAME_B,
            system_fingerprint="fp_0123456789",
            pid=4242,
            software_version="0.1.0",
        )
    )


def plan_decode() -> step.SchedulerFrame:
    """A steady step: two decoding rows, one of which gets a block. No position, no last token."""
    return step.SchedulerFrame(
        plan=step.StepPlan(
            epoch=4,
            seq=18,
            slots=pack_i32([0, 3]),
            num_tokens=pack_i32([1, 1]),
            flags=bytes([step.ROW_FLAG_SAMPLE, step.ROW_FLAG_SAMPLE | step.ROW_FLAG_LOGPROBS]),
            new_block_rows=pack_i32([3]),
            new_block_ids=pack_i32([77]),
            deadline_ms=60_000,
        )
    )


def plan_full() -> step.SchedulerFrame:
    """A step in which everything happens."""
    return step.SchedulerFrame(
        plan=step.StepPlan(
            epoch=4,
            seq=19,
            admit=[
                step.Admit(
                    slot=5,
                    request_id="req-1",
                    kind=common.REQUEST_KIND_GENERATE,
                    prompt_token_ids=pack_i32([10, 11, 12]),
                    output_token_ids=pack_i32([13]),
                    num_computed_tokens=0,
                    block_ids=pack_i32([6]),
                    sampling_params=sampling(),
                    trace=TRACE,
                )
            ],
            slots=pack_i32([0, 5]),
            num_tokens=pack_i32([1, 3]),
            flags=bytes([step.ROW_FLAG_SAMPLE, 0]),
            new_block_rows=pack_i32([0]),
            new_block_ids=pack_i32([8]),
            named_block_ids=pack_i32([1, 2]),
            block_names=NAME_A + NAME_B,
            retired_slots=pack_i32([7]),
            kv_ops=[
                step.KvOp(
                    op_id=1,
                    kind=step.KV_OP_KIND_OFFLOAD,
                    fence_seq=18,
                    src_block_ids=pack_i32([3]),
                    dst_block_ids=pack_i32([30]),
                    block_names=NAME_A,
                    peer="host",
                )
            ],
            adapter_ops=[
                step.AdapterOp(kind=step.ADAPTER_OP_KIND_LOAD, name="a", path="/adapters/a")
            ],
            traces=[TRACE],
            deadline_ms=60_000,
        )
    )


def result() -> step.WorkerFrame:
    return step.WorkerFrame(
        result=step.StepResult(
            epoch=4,
            seq=18,
            worker_epoch=0x0123456789ABCDEF,
            status=step.STEP_STATUS_OK,
            slots=pack_i32([0, 3, 4]),
            num_outputs=bytes([1, 1, 0]),
            token_ids=pack_i32([42, 2]),
            finished=bytes([0, 1, 1]),
            logprobs=logprobs(),
            kv_ops_done=[1],
            timings=step.StepTimings(
                queue_micros=10,
                prepare_micros=20,
                forward_micros=900,
                sample_micros=30,
                idle_micros=5,
            ),
            row_errors=[
                step.RowError(slot=4, error=common.Error(name="numeric_error", message="NaN"))
            ],
            device_memory_bytes=1 << 30,
        )
    )


def result_failed() -> step.WorkerFrame:
    return step.WorkerFrame(
        result=step.StepResult(
            epoch=4, seq=19, worker_epoch=1, status=step.STEP_STATUS_FAILED, error="out of memory"
        )
    )


def ack() -> step.WorkerFrame:
    return step.WorkerFrame(
        ack=step.Ack(epoch=4, seq=18, worker_epoch=2, status=step.STEP_STATUS_OK)
    )


def worker_heartbeat() -> step.WorkerFrame:
    return step.WorkerFrame(
        heartbeat=step.Heartbeat(epoch=4, last_seq=18, busy_micros=1500, metrics=b"# page\n")
    )


def scheduler_heartbeat() -> step.SchedulerFrame:
    return step.SchedulerFrame(heartbeat=step.Heartbeat(epoch=4, last_seq=19))


def welcome() -> step.SchedulerFrame:
    return step.SchedulerFrame(welcome=step.Welcome(epoch=4, protocol_version=PROTOCOL_VERSION))


def refusal() -> step.SchedulerFrame:
    return step.SchedulerFrame(refusal=step.Refusal(reason="block size 32 is not 16"))


def shutdown() -> step.SchedulerFrame:
    return step.SchedulerFrame(shutdown=step.Shutdown(reason="the scheduler ends"))


def attach_hello() -> engine.AttachRequest:
    return engine.AttachRequest(
        hello=engine.AttachHello(gateway_id="gw-1", protocol_version=PROTOCOL_VERSION)
    )


def attach_submit() -> engine.AttachRequest:
    """A resubmission: three tokens of the output were delivered before."""
    return engine.AttachRequest(
        submit=engine.Submit(
            handle=9,
            attempt=1,
            request_id="req-9",
            kind=common.REQUEST_KIND_GENERATE,
            prompt_token_ids=pack_i32([10, 11, 12]),
            output_token_ids=pack_i32([13, 14, 15]),
            sampling_params=sampling(),
            priority=-1,
            adapter="a",
            cache_salt="salt",
            tenant="t",
            deaths=1,
            grammar=common.Grammar(kind=common.GRAMMAR_KIND_REGEX, text="[0-9]+"),
            trace=TRACE,
        )
    )


def attach_cancel() -> engine.AttachRequest:
    return engine.AttachRequest(cancel=engine.Cancel(handle=9, attempt=1))


def attach_welcome() -> engine.AttachResponse:
    return engine.AttachResponse(
        welcome=engine.AttachWelcome(scheduler_epoch=4, protocol_version=PROTOCOL_VERSION)
    )


def attach_outputs() -> engine.AttachResponse:
    """Three rows: a token, the last token, a failure."""
    return engine.AttachResponse(
        handles=pack_u32([9, 10, 11]),
        attempts=pack_u32([1, 0, 0]),
        first_indices=pack_u32([3, 127, 0]),
        num_tokens=pack_u32([1, 1, 0]),
        token_ids=pack_i32([42, 2]),
        finish_reasons=bytes(
            [
                common.FINISH_REASON_UNSPECIFIED,
                common.FINISH_REASON_STOP,
                common.FINISH_REASON_ERROR,
            ]
        ),
        stop_token_ids=pack_i32([-1, 2, -1]),
        num_cached_tokens=pack_u32([0, 64, 0]),
        deaths=pack_u32([1, 0, 0]),
        logprobs=logprobs(),
        failures=[
            engine.Failure(
                handle=11,
                error=common.Error(name="queue_full", message="full", retry_after_s=1.5),
            )
        ],
    )


def generate_request() -> engine.GenerateRequest:
    return engine.GenerateRequest(
        request_id="req-2",
        prompt_token_ids=[10, 11, 12],
        sampling_params=sampling(),
        priority=1,
        cache_salt="salt",
        model="demo",
    )


def generate_response() -> engine.GenerateResponse:
    return engine.GenerateResponse(
        request_id="req-2",
        token_ids=[42, 2],
        finish_reason=common.FINISH_REASON_STOP,
        stop_token_id=2,
        usage=engine.Usage(num_prompt_tokens=3, num_output_tokens=2, num_cached_tokens=0),
        logprobs=logprobs(),
    )


def frames() -> dict[str, Message]:
    """Name of the golden file -> message."""
    builders = (
        hello, plan_decode, plan_full, result, result_failed, ack, worker_heartbeat,
        scheduler_heartbeat, welcome, refusal, shutdown, attach_hello, attach_submit,
        attach_cancel, attach_welcome, attach_outputs, generate_request, generate_response,
    )  # fmt: skip
    return {build.__name__: build() for build in builders}


def encode(message: Message) -> bytes:
    return message.SerializeToString(deterministic=True)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, message in frames().items():
        (GOLDEN / f"{name}.bin").write_bytes(encode(message))
        print(f"{name:<22}{len(encode(message)):>6} bytes")
