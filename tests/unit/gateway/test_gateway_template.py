"""Chat templates: what they render, and that none of them can hang or escape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gateway_builders import CHATML, byte_backend

from quire.errors import InvalidRequest, ModelError
from quire_gateway.text import sandbox as module
from quire_gateway.text.template import ChatTemplate
from quire_gateway.text.tokenizer import Tokenizer

DOUBLING = "{%% set n = namespace(x='aaaa') %%}{%% for i in range(60) %%}%s{%% endfor %%}"
HI = [{"role": "user", "content": "hi"}]
TOKENIZER = Tokenizer(byte_backend(), {"bos_token": "<s>"})


def render(source: str, messages: object = HI, **kwargs: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **kwargs)  # type: ignore[arg-type]


def test_chatml() -> None:
    assert render(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert not render(CHATML, add_generation_prompt=False).endswith("assistant\n")


def test_final_message_is_continued() -> None:
    messages = [*HI, {"role": "assistant", "content": "Once "}]
    assert render(CHATML, messages, continue_final_message=True).endswith("assistant\nOnce ")
    trimmed = CHATML.replace("message['content']", "message['content'] | trim")
    assert render(trimmed, messages, continue_final_message=True).endswith("assistant\nOnce")
    with pytest.raises(InvalidRequest, match="does not show the final message"):
        render("x", continue_final_message=True)


def test_parts_become_text_or_text_becomes_parts() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]}]
    assert "a\nb" in render(CHATML, parts)
    of_parts = (
        "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    )
    assert render(of_parts, parts) == "[a][b]"
    assert render(of_parts, HI) == "[hi]"


def test_variables_of_transformers_are_there() -> None:
    assert render("{{ bos_token }}{{ tools is none }}{{ documents is none }}") == "<s>TrueTrue"
    assert render("{{ thinking }}", kwargs={"thinking": "no"}) == "no"
    assert render("{{ {'é': '<b>'} | tojson }}") == '{"é": "<b>"}'
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert render("{% generation %}x{% endgeneration %}") == "x"
    assert (
        render("{% for i in [1,2,3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "1"
    )
    loops = "{% for i in 'abc' %}{{ loop.length }}{{ loop.last }}{{ loop.nextitem }}{% endfor %}"
    assert render(loops).startswith("3Falseb")
    assert (
        render("{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a ~ dict(b=2).b }}") == "22"
    )


def test_refusal_of_the_template_reaches_the_client() -> None:
    source = "{% if messages[0].content == 'hi' %}{{ raise_exception('no hi here') }}{% endif %}"
    with pytest.raises(InvalidRequest, match="no hi here") as raised:
        render(source)
    assert raised.value.param == "messages" and raised.value.kind.status == 400


@pytest.mark.parametrize(
    "source",
    [
        "{{ missing.field }}",
        "{{ 1 / 0 }}",
        "{{ messages[99].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{{ f(n-1) if n }}{{ f(n-1) if n }}{% endmacro %}{{ f(50) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 'a'.center(10**9) }}",
        "{{ range(10**9) | list }}",
        DOUBLING % "{% set n.x = n.x ~ n.x %}",
        DOUBLING % "{% set n.x = n.x + n.x %}",
        DOUBLING % "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}",
    ],
)
def test_broken_and_hostile_templates_are_refused(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_STEPS", 20_000)
    with pytest.raises(InvalidRequest) as raised:
        render(source)
    assert len(raised.value.message) < 600


def test_slow_template_runs_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 0.0)
    with pytest.raises(InvalidRequest, match="runs too long"):
        render("{% for i in range(10) %}{% endfor %}")


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "{% nothing %}", "{{ a | no_filter }}"])
def test_template_that_does_not_compile_is_a_model_error(source: str) -> None:
    with pytest.raises(ModelError, match="here"):
        ChatTemplate(source, {}, "here")


def test_sources_in_order(tmp_path: Path) -> None:
    def found(override: str = "") -> str | None:
        template = ChatTemplate.from_folder(tmp_path, TOKENIZER, override)
        return template.render(HI) if template else None

    config = tmp_path / "tokenizer_config.json"
    assert found() is None
    config.write_text(json.dumps({"chat_template": "string"}))
    assert found() == "string"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert found() == "named"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert found() == "file"
    (tmp_path / "other.jinja").write_text("override")
    assert found(str(tmp_path / "other.jinja")) == "override"
    with pytest.raises(ModelError, match="nowhere"):
        found(str(tmp_path / "nowhere"))


def test_same_prompt_as_transformers() -> None:
    jinja = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [
        {"role": "system", "content": "Be <b>brief</b>.\n"},
        {"role": "user", "content": "é"},
    ]
    source = (
        "{%- for m in messages %}\n    {%- if loop.first and m.role == 'system' %}\n"
        "{{ bos_token }}[{{ m.content | trim }}]\n    {%- else %}\n{{ m.role | upper }}: "
        "{{ m | tojson }}\n{% endif %}\n{%- endfor %}\n{% if add_generation_prompt %}A:{% endif %}"
    )
    theirs, _ = jinja.render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert render(source, messages) == theirs[0]
