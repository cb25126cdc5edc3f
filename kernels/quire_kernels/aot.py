"""Compile every Triton kernel without a GPU, and say what it costs: `python -m quire_kernels.aot`.

Knows the launchers and nothing of models beyond the shapes below. Each launcher runs on meta
tensors with its kernels replaced by recorders, so what is compiled has the constants, strides and
alignments of a real launch. Registers, stack and spilled bytes are read from the cubin by triton's
own cuobjdump. Must not run under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quire_kernels.gpu import act, attention, kv_write, norm, sampling, tiles

ARCHITECTURES = (80, 90)
_MODULES = (act, attention, kv_write, norm, sampling)
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    case: str
    kernel: Any  # the JITFunction
    values: dict[str, Any]  # argument name -> value
    options: dict[str, Any]  # of _OPTIONS


@dataclass(frozen=True)
class Usage:
    """What one compiled kernel takes on one architecture."""

    case: str
    kernel: str
    arch: int
    registers: int
    stack: int  # bytes a thread; spills live here
    local: int  # bytes a thread
    shared: int  # bytes a block, dynamic included


def cases(arch: int) -> dict[str, Callable[[], object]]:
    """Name -> a call of a launcher on meta tensors, with shapes of Qwen3-8B, Llama-3.2-1B and
    Gemma-like heads.
    """
    split = tiles.Tiles(16, 64, 512, split=True, num_warps=4, num_stages=3)
    fixed = tiles.Tiles(32, 64, 512, split=False, num_warps=4, num_stages=3)
    return {
        "attention decode split d128": lambda: _attention(split, tokens=32, reqs=32, head_dim=128),
        "attention fixed tiles d128": lambda: _attention(fixed, tokens=4096, reqs=4, head_dim=128),
        "attention decode d64": lambda: _attention(arch, tokens=512, reqs=512, head_dim=64),
        "attention decode d128": lambda: _attention(arch, tokens=512, reqs=512, head_dim=128),
        "attention prefill d128": lambda: _attention(arch, tokens=4096, reqs=4, head_dim=128),
        "attention prefill window d128": lambda: _attention(
            arch, tokens=4096, reqs=4, head_dim=128, window=4096
        ),
        "attention prefill d80": lambda: _attention(arch, tokens=4096, reqs=4, head_dim=80),
        "attention prefill d256": lambda: _attention(arch, tokens=4096, reqs=4, head_dim=256),
        "rope + write d128 norm": lambda: _rope(head_dim=128, rotary=128, with_norm=True),
        "rope + write d80 rotary 32": lambda: _rope(head_dim=80, rotary=32, with_norm=False),
        "rms_norm 4096": lambda: norm.rms_norm(_meta(8, 4096), _meta(4096), 1e-6),
        "add_rms_norm 4096": lambda: norm.add_rms_norm(
            _meta(8, 4096), _meta(8, 4096), _meta(4096), 1e-6
        ),
        "silu_mul 12288": lambda: act.silu_mul(_meta(8, 24576)),
        "sample 151936": _sample,
    }


def record(arch: int) -> list[Launch]:
    """Every launch of every case on one architecture; nothing is compiled yet."""
    launches: list[Launch] = []
    for case, call in cases(arch).items():
        with _recorders(case, launches):
            call()
    return launches


def compile_launch(launch: Launch, arch: int) -> Usage:
    """Compile one launch as triton would specialise it, and read its resources."""
    signature, constants, attributes = _specialise(launch)
    source = ASTSource(
        fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [str(_cuobjdump()), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return Usage(
        launch.case,
        launch.kernel.__name__,
        arch,
        found["REG"],
        found["STACK"],
        found["LOCAL"],
        int(compiled.metadata.shared),
    )


def table(rows: list[Usage]) -> str:
    head = f"{'case':32}{'kernel':24}{'sm':>4}{'regs':>6}{'stack':>7}{'local':>7}{'shared':>9}"
    body = [
        f"{u.case:32}{u.kernel:24}{u.arch:>4}{u.registers:>6}{u.stack:>7}{u.local:>7}{u.shared:>9}"
        for u in rows
    ]
    return "\n".join([head, *body])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire_kernels.aot", description=__doc__)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON list instead of the table"
    )
    arguments = parser.parse_args()
    rows = [compile_launch(launch, arch) for arch in ARCHITECTURES for launch in record(arch)]
    sys.stdout.write(
        (json.dumps([asdict(u) for u in rows]) if arguments.json else table(rows)) + "\n"
    )
    return 1 if any(u.stack or u.local for u in rows) else 0


class _Recorder:
    """Stands where a kernel stood: `recorder[grid](...)` notes the launch."""

    def __init__(self, case: str, kernel: Any, launches: list[Launch]) -> None:
        self.case, self.kernel, self.launches = case, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in _OPTIONS if name in named}
            names = [parameter.name for parameter in self.kernel.params]
            values = dict(zip(names, args, strict=False)) | named
            self.launches.append(Launch(self.case, self.kernel, values, options))

        return launch


@contextmanager
def _recorders(case: str, launches: list[Launch]) -> Iterator[None]:
    replaced: list[tuple[ModuleType, str, Any]] = []
    for module in _MODULES:
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel") and isinstance(value, triton.runtime.JITFunction):
                replaced.append((module, name, value))
                setattr(module, name, _Recorder(case, value, launches))
    try:
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


def _specialise(
    launch: Launch,
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], list[list[Any]]]]:
    """triton's launch rules: pointers and multiples of 16 are marked divisible, ones are constants,
    unless told not to.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.values[parameter.name]
        divisible = [["tt.divisibility", 16]]
        if parameter.is_constexpr or (
            type(value) is int and value == 1 and not parameter.do_not_specialize
        ):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            attributes[(index,)] = divisible
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = divisible
    return signature, constants, attributes


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ints(*shape: int) -> torch.Tensor:
    return _meta(*shape, dtype=torch.int32)


def _cache(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's K and V views of a pool of 36 layers."""
    pool = _meta(1000, 36, 2, 8, 16, head_dim)
    return pool[:, 3, 0], pool[:, 3, 1]


def _attention(
    cut: tiles.Tiles | int, *, tokens: int, reqs: int, head_dim: int, window: int = 0
) -> None:
    """`cut` as given, or as chosen for the architecture it names."""
    q = _meta(tokens, 48, head_dim)[:, :32]  # a view of fused QKV
    if isinstance(cut, int):
        limits: dict[str, Any] = {"max_seq_len": 8192, "multiprocessors": 1, "capability": cut}
        cut = tiles.choose_tiles(tokens, reqs, 4, 8, head_dim, 2, **limits)
    batch = (_ints(512, 512), _ints(reqs), _ints(reqs + 1), _ints(reqs))
    out = _meta(tokens, 32, head_dim)
    attention.launch(cut, out, q, *_cache(head_dim), *batch, 0.1, window, 16, 8192)


def _rope(*, head_dim: int, rotary: int, with_norm: bool) -> None:
    q, k, v = _meta(8, 48, head_dim).split([32, 8, 8], dim=1)
    norms: dict[str, Any] = (
        {"q_norm": _meta(head_dim), "k_norm": _meta(head_dim)} if with_norm else {}
    )
    angles = _meta(4096, rotary, dtype=torch.float32)
    places = _meta(8, dtype=torch.int64)
    kv_write.rope_kv_write(q, k, v, _ints(8), angles, *_cache(head_dim), places, **norms)


def _sample() -> None:
    real = {"dtype": torch.float32}
    sampling.sample(
        _meta(8, 151936, **real), _meta(8, dtype=torch.int64), _ints(8), _meta(8, **real)
    )


def _cuobjdump() -> Path:
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; this triton does not bundle cuobjdump")
    return path


if __name__ == "__main__":
    sys.exit(main())
