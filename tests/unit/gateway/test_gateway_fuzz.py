"""Whatever JSON stands in whatever field: an Ask or an InvalidRequest, nothing else."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from quire.errors import InvalidRequest
from quire_gateway.openai.ask import Ask, Limits
from quire_gateway.openai.body import parse_json
from quire_gateway.openai.chat import read_chat
from quire_gateway.openai.completions import read_completion

LIMITS = Limits(("fake",), 300, 512, 128, {})
FIELDS = (
    "model messages prompt max_tokens max_completion_tokens temperature top_p top_k min_p n stop "
    "repetition_penalty presence_penalty frequency_penalty stop_token_ids seed ignore_eos echo "
    "min_tokens stream stream_options logprobs top_logprobs logit_bias skip_special_tokens suffix "
    "add_generation_prompt continue_final_message chat_template_kwargs priority cache_salt tools "
    "response_format best_of allowed_token_ids add_special_tokens bad_words tool_choice"
).split()
INSIDE = ["role", "content", "type", "text", "user", "system", "name", "include_usage", "1"]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**320), 10**320), st.integers(-3, 300),
    st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=5), st.sampled_from(INSIDE),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(INSIDE) | st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=6,
)
START = {"prompt": "hi", "messages": [{"role": "user", "content": "hi"}]}


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), values, max_size=4))
def test_fields_of_any_kind(change: dict[str, Any]) -> None:
    body = parse_json(json.dumps(START | change).encode())
    for read in (read_chat, read_completion):
        try:
            ask = read(body, LIMITS)
        except InvalidRequest as error:
            assert len(error.message) < 1000 and error.kind.status in (400, 404)
        else:
            assert isinstance(ask, Ask)
            for choice in range(ask.params.n):
                ask.params.seeded().choice(choice).to_proto()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40) | st.text('{}[]":,0123456789.eE-\\uadnltrf ', max_size=40))
def test_bytes_of_any_kind(raw: bytes | str) -> None:
    try:
        assert isinstance(parse_json(raw if isinstance(raw, bytes) else raw.encode()), dict)
    except InvalidRequest as error:
        assert error.name == "invalid_json"
