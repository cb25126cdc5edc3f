"""GenerationDefaults: what a model's generation_config.json says about sampling.

As vLLM does: temperature, top_p, top_k, min_p and repetition_penalty there replace the
protocol's defaults; do_sample and max_new_tokens are not looked at. Knows no requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quire.errors import InvalidRequest, ModelError
from quire.sampling import SamplingParams
from quire_gateway.text.tokenizer import read_json

FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationDefaults:
    """Sampling fields a request that does not name them gets, and the model's EOS ids."""

    sampling: dict[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path, mode: str = "auto") -> GenerationDefaults:
        """Read the file; nothing when there is none. mode 'none' takes only the EOS ids.

        Raises ModelError naming the field when a value can't be used.
        """
        path = folder / "generation_config.json"
        values = read_json(path)
        sampling = {n: values[n] for n in FIELDS if values.get(n) is not None}
        if mode == "none":
            sampling = {}
        try:
            SamplingParams(**sampling).check()
        except InvalidRequest as error:
            raise ModelError(
                f"{path}: {error.message} Correct it, or start with --generation-config none."
            ) from None
        eos = values.get("eos_token_id")
        ids = eos if isinstance(eos, list) else [eos]
        return cls(sampling, tuple(i for i in ids if isinstance(i, int) and i >= 0))
