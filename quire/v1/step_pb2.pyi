from quire.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_DEVICE: _ClassVar[Tier]
    TIER_HOST: _ClassVar[Tier]
    TIER_STORE: _ClassVar[Tier]

class RowFlag(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROW_FLAG_UNSPECIFIED: _ClassVar[RowFlag]
    ROW_FLAG_SAMPLE: _ClassVar[RowFlag]
    ROW_FLAG_LOGPROBS: _ClassVar[RowFlag]
    ROW_FLAG_VERIFY: _ClassVar[RowFlag]
    ROW_FLAG_POOL: _ClassVar[RowFlag]

class KvOpKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_OP_KIND_UNSPECIFIED: _ClassVar[KvOpKind]
    KV_OP_KIND_ZERO: _ClassVar[KvOpKind]
    KV_OP_KIND_OFFLOAD: _ClassVar[KvOpKind]
    KV_OP_KIND_LOAD: _ClassVar[KvOpKind]
    KV_OP_KIND_SEND: _ClassVar[KvOpKind]
    KV_OP_KIND_RECV: _ClassVar[KvOpKind]
    KV_OP_KIND_STORE: _ClassVar[KvOpKind]
    KV_OP_KIND_FETCH: _ClassVar[KvOpKind]

class AdapterOpKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_OP_KIND_UNSPECIFIED: _ClassVar[AdapterOpKind]
    ADAPTER_OP_KIND_LOAD: _ClassVar[AdapterOpKind]
    ADAPTER_OP_KIND_EVICT: _ClassVar[AdapterOpKind]

class StepStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STEP_STATUS_UNSPECIFIED: _ClassVar[StepStatus]
    STEP_STATUS_OK: _ClassVar[StepStatus]
    STEP_STATUS_FAILED: _ClassVar[StepStatus]
    STEP_STATUS_REFUSED: _ClassVar[StepStatus]
TIER_UNSPECIFIED: Tier
TIER_DEVICE: Tier
TIER_HOST: Tier
TIER_STORE: Tier
ROW_FLAG_UNSPECIFIED: RowFlag
ROW_FLAG_SAMPLE: RowFlag
ROW_FLAG_LOGPROBS: RowFlag
ROW_FLAG_VERIFY: RowFlag
ROW_FLAG_POOL: RowFlag
KV_OP_KIND_UNSPECIFIED: KvOpKind
KV_OP_KIND_ZERO: KvOpKind
KV_OP_KIND_OFFLOAD: KvOpKind
KV_OP_KIND_LOAD: KvOpKind
KV_OP_KIND_SEND: KvOpKind
KV_OP_KIND_RECV: KvOpKind
KV_OP_KIND_STORE: KvOpKind
KV_OP_KIND_FETCH: KvOpKind
ADAPTER_OP_KIND_UNSPECIFIED: AdapterOpKind
ADAPTER_OP_KIND_LOAD: AdapterOpKind
ADAPTER_OP_KIND_EVICT: AdapterOpKind
STEP_STATUS_UNSPECIFIED: StepStatus
STEP_STATUS_OK: StepStatus
STEP_STATUS_FAILED: StepStatus
STEP_STATUS_REFUSED: StepStatus

class WorkerFrame(_message.Message):
    __slots__ = ("hello", "result", "ack", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    result: StepResult
    ack: Ack
    heartbeat: Heartbeat
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class SchedulerFrame(_message.Message):
    __slots__ = ("welcome", "refusal", "plan", "heartbeat", "shutdown")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SHUTDOWN_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    refusal: Refusal
    plan: StepPlan
    heartbeat: Heartbeat
    shutdown: Shutdown
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., plan: _Optional[_Union[StepPlan, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., shutdown: _Optional[_Union[Shutdown, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "rank", "tp_rank", "tp_size", "pp_rank", "pp_size", "worker_epoch", "highest_epoch", "last_seq", "model", "model_digest", "dtype", "kv_dtype", "block_size", "tiers", "max_slots", "max_model_len", "vocab_size", "eos_token_ids", "device", "attention_backend", "step_costs", "held_block_ids", "held_block_names", "system_fingerprint", "pid", "software_version", "held_host_block_ids", "held_host_block_names")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TP_RANK_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    PP_RANK_FIELD_NUMBER: _ClassVar[int]
    PP_SIZE_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    STEP_COSTS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCK_NAMES_FIELD_NUMBER: _ClassVar[int]
    SYSTEM_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    HELD_HOST_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    HELD_HOST_BLOCK_NAMES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    rank: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    worker_epoch: int
    highest_epoch: int
    last_seq: int
    model: str
    model_digest: str
    dtype: str
    kv_dtype: str
    block_size: int
    tiers: _containers.RepeatedCompositeFieldContainer[TierSize]
    max_slots: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    device: str
    attention_backend: str
    step_costs: _containers.RepeatedCompositeFieldContainer[StepCost]
    held_block_ids: bytes
    held_block_names: bytes
    system_fingerprint: str
    pid: int
    software_version: str
    held_host_block_ids: bytes
    held_host_block_names: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., rank: _Optional[int] = ..., tp_rank: _Optional[int] = ..., tp_size: _Optional[int] = ..., pp_rank: _Optional[int] = ..., pp_size: _Optional[int] = ..., worker_epoch: _Optional[int] = ..., highest_epoch: _Optional[int] = ..., last_seq: _Optional[int] = ..., model: _Optional[str] = ..., model_digest: _Optional[str] = ..., dtype: _Optional[str] = ..., kv_dtype: _Optional[str] = ..., block_size: _Optional[int] = ..., tiers: _Optional[_Iterable[_Union[TierSize, _Mapping]]] = ..., max_slots: _Optional[int] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., device: _Optional[str] = ..., attention_backend: _Optional[str] = ..., step_costs: _Optional[_Iterable[_Union[StepCost, _Mapping]]] = ..., held_block_ids: _Optional[bytes] = ..., held_block_names: _Optional[bytes] = ..., system_fingerprint: _Optional[str] = ..., pid: _Optional[int] = ..., software_version: _Optional[str] = ..., held_host_block_ids: _Optional[bytes] = ..., held_host_block_names: _Optional[bytes] = ...) -> None: ...

class TierSize(_message.Message):
    __slots__ = ("tier", "num_blocks", "block_bytes", "copy_micros")
    TIER_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    COPY_MICROS_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    num_blocks: int
    block_bytes: int
    copy_micros: int
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., num_blocks: _Optional[int] = ..., block_bytes: _Optional[int] = ..., copy_micros: _Optional[int] = ...) -> None: ...

class StepCost(_message.Message):
    __slots__ = ("num_tokens", "num_context_tokens", "micros", "num_attended_tokens")
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MICROS_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTENDED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_tokens: int
    num_context_tokens: int
    micros: int
    num_attended_tokens: int
    def __init__(self, num_tokens: _Optional[int] = ..., num_context_tokens: _Optional[int] = ..., micros: _Optional[int] = ..., num_attended_tokens: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("epoch", "protocol_version")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    protocol_version: int
    def __init__(self, epoch: _Optional[int] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Shutdown(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("epoch", "last_seq", "busy_micros", "metrics")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAST_SEQ_FIELD_NUMBER: _ClassVar[int]
    BUSY_MICROS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    last_seq: int
    busy_micros: int
    metrics: bytes
    def __init__(self, epoch: _Optional[int] = ..., last_seq: _Optional[int] = ..., busy_micros: _Optional[int] = ..., metrics: _Optional[bytes] = ...) -> None: ...

class StepPlan(_message.Message):
    __slots__ = ("epoch", "seq", "admit", "slots", "num_tokens", "flags", "new_block_rows", "new_block_ids", "named_block_ids", "block_names", "retired_slots", "kv_ops", "adapter_ops", "traces", "draft_counts", "micro_batch", "new_block_pools", "mask_frame", "deadline_ms")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    ADMIT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    NEW_BLOCK_ROWS_FIELD_NUMBER: _ClassVar[int]
    NEW_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    NAMED_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_NAMES_FIELD_NUMBER: _ClassVar[int]
    RETIRED_SLOTS_FIELD_NUMBER: _ClassVar[int]
    KV_OPS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_OPS_FIELD_NUMBER: _ClassVar[int]
    TRACES_FIELD_NUMBER: _ClassVar[int]
    DRAFT_COUNTS_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    NEW_BLOCK_POOLS_FIELD_NUMBER: _ClassVar[int]
    MASK_FRAME_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    seq: int
    admit: _containers.RepeatedCompositeFieldContainer[Admit]
    slots: bytes
    num_tokens: bytes
    flags: bytes
    new_block_rows: bytes
    new_block_ids: bytes
    named_block_ids: bytes
    block_names: bytes
    retired_slots: bytes
    kv_ops: _containers.RepeatedCompositeFieldContainer[KvOp]
    adapter_ops: _containers.RepeatedCompositeFieldContainer[AdapterOp]
    traces: _containers.RepeatedCompositeFieldContainer[_common_pb2.TraceContext]
    draft_counts: bytes
    micro_batch: int
    new_block_pools: bytes
    mask_frame: bytes
    deadline_ms: int
    def __init__(self, epoch: _Optional[int] = ..., seq: _Optional[int] = ..., admit: _Optional[_Iterable[_Union[Admit, _Mapping]]] = ..., slots: _Optional[bytes] = ..., num_tokens: _Optional[bytes] = ..., flags: _Optional[bytes] = ..., new_block_rows: _Optional[bytes] = ..., new_block_ids: _Optional[bytes] = ..., named_block_ids: _Optional[bytes] = ..., block_names: _Optional[bytes] = ..., retired_slots: _Optional[bytes] = ..., kv_ops: _Optional[_Iterable[_Union[KvOp, _Mapping]]] = ..., adapter_ops: _Optional[_Iterable[_Union[AdapterOp, _Mapping]]] = ..., traces: _Optional[_Iterable[_Union[_common_pb2.TraceContext, _Mapping]]] = ..., draft_counts: _Optional[bytes] = ..., micro_batch: _Optional[int] = ..., new_block_pools: _Optional[bytes] = ..., mask_frame: _Optional[bytes] = ..., deadline_ms: _Optional[int] = ...) -> None: ...

class Admit(_message.Message):
    __slots__ = ("slot", "request_id", "kind", "prompt_token_ids", "output_token_ids", "num_computed_tokens", "block_ids", "sampling_params", "adapter", "grammar", "trace", "multimodal", "waited_micros")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_PARAMS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    MULTIMODAL_FIELD_NUMBER: _ClassVar[int]
    WAITED_MICROS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    request_id: str
    kind: _common_pb2.RequestKind
    prompt_token_ids: bytes
    output_token_ids: bytes
    num_computed_tokens: int
    block_ids: bytes
    sampling_params: _common_pb2.SamplingParams
    adapter: str
    grammar: _common_pb2.Grammar
    trace: _common_pb2.TraceContext
    multimodal: bytes
    waited_micros: int
    def __init__(self, slot: _Optional[int] = ..., request_id: _Optional[str] = ..., kind: _Optional[_Union[_common_pb2.RequestKind, str]] = ..., prompt_token_ids: _Optional[bytes] = ..., output_token_ids: _Optional[bytes] = ..., num_computed_tokens: _Optional[int] = ..., block_ids: _Optional[bytes] = ..., sampling_params: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., adapter: _Optional[str] = ..., grammar: _Optional[_Union[_common_pb2.Grammar, _Mapping]] = ..., trace: _Optional[_Union[_common_pb2.TraceContext, _Mapping]] = ..., multimodal: _Optional[bytes] = ..., waited_micros: _Optional[int] = ...) -> None: ...

class KvOp(_message.Message):
    __slots__ = ("op_id", "kind", "fence_seq", "src_block_ids", "dst_block_ids", "block_names", "peer")
    OP_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    FENCE_SEQ_FIELD_NUMBER: _ClassVar[int]
    SRC_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    DST_BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_NAMES_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    op_id: int
    kind: KvOpKind
    fence_seq: int
    src_block_ids: bytes
    dst_block_ids: bytes
    block_names: bytes
    peer: str
    def __init__(self, op_id: _Optional[int] = ..., kind: _Optional[_Union[KvOpKind, str]] = ..., fence_seq: _Optional[int] = ..., src_block_ids: _Optional[bytes] = ..., dst_block_ids: _Optional[bytes] = ..., block_names: _Optional[bytes] = ..., peer: _Optional[str] = ...) -> None: ...

class AdapterOp(_message.Message):
    __slots__ = ("kind", "name", "path")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    kind: AdapterOpKind
    name: str
    path: str
    def __init__(self, kind: _Optional[_Union[AdapterOpKind, str]] = ..., name: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("epoch", "seq", "worker_epoch", "status", "error", "slots", "num_outputs", "token_ids", "finished", "logprobs", "kv_ops_done", "timings", "row_errors", "device_memory_bytes", "pooled", "num_accepted")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    KV_OPS_DONE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    ROW_ERRORS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    POOLED_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    seq: int
    worker_epoch: int
    status: StepStatus
    error: str
    slots: bytes
    num_outputs: bytes
    token_ids: bytes
    finished: bytes
    logprobs: _common_pb2.LogprobColumns
    kv_ops_done: _containers.RepeatedScalarFieldContainer[int]
    timings: StepTimings
    row_errors: _containers.RepeatedCompositeFieldContainer[RowError]
    device_memory_bytes: int
    pooled: bytes
    num_accepted: int
    def __init__(self, epoch: _Optional[int] = ..., seq: _Optional[int] = ..., worker_epoch: _Optional[int] = ..., status: _Optional[_Union[StepStatus, str]] = ..., error: _Optional[str] = ..., slots: _Optional[bytes] = ..., num_outputs: _Optional[bytes] = ..., token_ids: _Optional[bytes] = ..., finished: _Optional[bytes] = ..., logprobs: _Optional[_Union[_common_pb2.LogprobColumns, _Mapping]] = ..., kv_ops_done: _Optional[_Iterable[int]] = ..., timings: _Optional[_Union[StepTimings, _Mapping]] = ..., row_errors: _Optional[_Iterable[_Union[RowError, _Mapping]]] = ..., device_memory_bytes: _Optional[int] = ..., pooled: _Optional[bytes] = ..., num_accepted: _Optional[int] = ...) -> None: ...

class StepTimings(_message.Message):
    __slots__ = ("queue_micros", "prepare_micros", "forward_micros", "sample_micros", "idle_micros", "copy_micros")
    QUEUE_MICROS_FIELD_NUMBER: _ClassVar[int]
    PREPARE_MICROS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_MICROS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_MICROS_FIELD_NUMBER: _ClassVar[int]
    IDLE_MICROS_FIELD_NUMBER: _ClassVar[int]
    COPY_MICROS_FIELD_NUMBER: _ClassVar[int]
    queue_micros: int
    prepare_micros: int
    forward_micros: int
    sample_micros: int
    idle_micros: int
    copy_micros: int
    def __init__(self, queue_micros: _Optional[int] = ..., prepare_micros: _Optional[int] = ..., forward_micros: _Optional[int] = ..., sample_micros: _Optional[int] = ..., idle_micros: _Optional[int] = ..., copy_micros: _Optional[int] = ...) -> None: ...

class RowError(_message.Message):
    __slots__ = ("slot", "error")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    slot: int
    error: _common_pb2.Error
    def __init__(self, slot: _Optional[int] = ..., error: _Optional[_Union[_common_pb2.Error, _Mapping]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("epoch", "seq", "worker_epoch", "status", "error")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    WORKER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    seq: int
    worker_epoch: int
    status: StepStatus
    error: str
    def __init__(self, epoch: _Optional[int] = ..., seq: _Optional[int] = ..., worker_epoch: _Optional[int] = ..., status: _Optional[_Union[StepStatus, str]] = ..., error: _Optional[str] = ...) -> None: ...
