"""The jinja2 sandbox of chat templates: transformers' environment, with bounds.

A template comes with a model and a model comes from anywhere, so loops, calls, time and size
of one rendering are counted. Knows no messages.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.errors import InvalidRequest

MAX_STEPS = 200_000  # loop rounds and calls in one rendering
MAX_CHARS = 32 << 20  # characters printed and joined in one rendering
MAX_SECONDS = 2.0
MAX_ARGUMENT = 1_000_000  # largest number a template may pass to a function


class Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.chars = MAX_CHARS
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0 or time.monotonic() > self.deadline:
            raise InvalidRequest("The chat template runs too long on these messages.", "messages")

    def take(self, chars: int) -> None:
        self.chars -= chars
        if self.chars < 0:
            raise InvalidRequest("The chat template makes too long a prompt.", "messages")


budget: ContextVar[Budget | None] = ContextVar("template_budget", default=None)


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    left = budget.get()
    for value in values:
        if left is not None:
            left.step()
        yield value


def _sized(value: Any) -> Any:
    if isinstance(value, (str, list, tuple)) and (left := budget.get()) is not None:
        left.take(len(value))
    return value


def _joined(values: Sequence[Any]) -> str:
    return str(_sized("".join(map(str, values))))


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks what a model is trained on; here it only shows its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """namespace() without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _plain_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _plain_name(name)
        super().__setitem__(name, value)


def _plain_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name[:64]!r} is not allowed")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, with every loop, call and join counted."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(jinja2.nodes.For)):
            loop.iter = jinja2.nodes.Filter(
                loop.iter, "_counted", [], [], None, None, lineno=loop.lineno
            )
        for concat in list(tree.find_all(jinja2.nodes.Concat)):
            values = jinja2.nodes.List(concat.nodes, lineno=concat.lineno)
            joined = jinja2.nodes.Filter(
                values, "_joined", [], [], None, None, lineno=concat.lineno
            )
            concat.nodes = [joined]
        tree.set_environment(self)
        return tree

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if (left := budget.get()) is not None:
            left.step()
        for value in args:
            if isinstance(value, int) and value > MAX_ARGUMENT:
                raise jinja2.exceptions.SecurityError(f"the number {value:.0e} is too large here")
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            sizes = [len(v) if isinstance(v, (str, list, tuple)) else v for v in (left, right)]
            if all(isinstance(v, int) for v in sizes) and abs(sizes[0] * sizes[1]) > MAX_CHARS:
                raise jinja2.exceptions.SecurityError("the product is too large")
        elif operator == "**" and max(abs(left), abs(right)) > 1000:
            raise jinja2.exceptions.SecurityError("the power is too large")
        elif operator == "%" and isinstance(left, str) and len(left) > 1000:
            raise jinja2.exceptions.SecurityError("the format is too long")
        return _sized(super().call_binop(context, operator, left, right))


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Like json.dumps: jinja2's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dict:
    """dict() of a template: makes one, shows nothing of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def sandbox() -> jinja2.Environment:
    """The environment; set `budget` around each rendering, or nothing is counted."""
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_sized,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    filters: dict[str, Callable[..., Any]] = {
        "tojson": _tojson, "_counted": _counted, "_joined": _joined,
    }  # fmt: skip
    environment.filters.update(filters)
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_Dict(),
        namespace=_Namespace,
    )
    return environment
