"""`quire generate`: complete one prompt in this process, without a server.

Knows the Python API only.
"""

from __future__ import annotations

import sys

from quire.cli.options import Line
from quire.config import Resolved
from quire.errors import ConfigError


def run(line: Line, resolved: Resolved) -> int:
    """Print what the model makes of --prompt; the exit status."""
    text = prompt(line)
    params = sampling(line)
    from quire import LLM  # after the checks: it loads the engine

    config = resolved.config
    with_model = LLM(config=config)
    try:
        outputs = with_model.generate([text], params)
        print(outputs[0].outputs[0].text)
    finally:
        with_model.close()
    return 0


def prompt(line: Line) -> str:
    """--prompt, or stdin for '-'. Raises ConfigError when there is none."""
    text = line.option("prompt")
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace")
    if not text:
        raise ConfigError("generate needs --prompt TEXT (or --prompt - to read it from stdin).")
    return text


def sampling(line: Line):  # type: ignore[no-untyped-def]
    """SamplingParams of --max-tokens, --temperature and so on."""
    from quire.sampling import MAX_TOKENS, SEED_MASK, SamplingParams

    seed = line.option("seed")
    known = {o.key for o in line.command.options}
    return SamplingParams(
        max_tokens=line.integer("max_tokens", 1, MAX_TOKENS),
        temperature=line.number("temperature", 0, 2),
        top_p=line.number("top_p", 0, 1) if "top_p" in known else 1.0,
        top_k=line.integer("top_k", -1, 1 << 24) if "top_k" in known else 0,
        seed=line.integer("seed", 0, SEED_MASK) if seed else None,
        stop=(line.option("stop"),) if "stop" in known and line.option("stop") else (),
    )
