"""`quire generate`: complete one prompt in this process, without a server.

Knows the Python API only.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from quire.cli.options import Line
from quire.config import Resolved, settings
from quire.errors import ConfigError


def run(line: Line, resolved: Resolved) -> int:
    """Print what the model makes of --prompt; the exit status."""
    text = prompt(line)
    given = sampling(line)
    from quire.llm import LLM  # after the checks: making one loads the model

    values = {f.name: getattr(resolved.config, f.name) for f in settings()}
    with LLM(**values) as llm:
        params = replace(llm.get_default_sampling_params(), **given)
        print(llm.generate([text], params)[0].outputs[0].text)
    return 0


def prompt(line: Line) -> str:
    """--prompt, or stdin for '-'. Raises ConfigError when there is none."""
    text = line.option("prompt")
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    if not text:
        raise ConfigError("generate needs --prompt TEXT (or --prompt - to read it from stdin).")
    return text


def sampling(line: Line) -> dict[str, Any]:
    """The SamplingParams fields that were given, checked."""
    from quire.sampling import MAX_TOKENS, SEED_MASK

    found: dict[str, Any] = {"max_tokens": line.integer("max_tokens", 1, MAX_TOKENS)}
    if "temperature" in line.options:
        found["temperature"] = line.number("temperature", 0, 2)
    if "top_p" in line.options:
        found["top_p"] = line.number("top_p", 0, 1)
    if "top_k" in line.options:
        found["top_k"] = line.integer("top_k", -1, 1 << 24)
    if "seed" in line.options:
        found["seed"] = line.integer("seed", 0, SEED_MASK)
    if line.options.get("stop"):
        found["stop"] = (line.options["stop"],)
    return found
