"""Who may import whom."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rules.sources import PACKAGES, ROOT, imports, modules, name_of

# package -> packages of ours that it may import beside itself
ALLOWED: dict[str, set[str]] = {
    "quire": set(),
    "quire_kernels": set(),
    "quire_gateway": {"quire"},
    "quire_scheduler": {"quire"},
    "quire_worker": {"quire", "quire_kernels"},
}
# modules of `quire` that run services, and so import them inside functions
RUNNERS = ("quire.cli", "quire.llm", "quire.local", "quire.generation", "quire.simulation")
HEAVY = ("torch", "transformers", "triton", "safetensors")
LIGHT = ("quire", "quire_gateway", "quire_scheduler")


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_is_below_them(package: str) -> None:
    wrong = []
    for path in modules(package):
        runner = name_of(path).startswith(RUNNERS)
        for target, line, lazy in imports(path):
            top = target.split(".")[0]
            if top not in PACKAGES or top == package or top in ALLOWED[package]:
                continue
            if runner and lazy:
                continue
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", LIGHT)
def test_light_packages_name_no_tensor_library(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in modules(package)
        for target, line, _ in imports(path)
        if target.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after running `code`."""
    script = f"{code}\nimport sys\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error::ImportWarning", "-c", script],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("package", ["quire_gateway", "quire_scheduler"])
def test_services_without_tensors_load_no_tensor_library(package: str) -> None:
    names = [name_of(path) for path in modules(package) if path.name != "__main__.py"]
    loaded = loaded_by("\n".join(f"import {name}" for name in names))
    assert not loaded & {*HEAVY, *(set(PACKAGES) - {"quire", package})}


def test_help_loads_nothing_heavy() -> None:
    code = "from quire.cli import main\nfor c in ([], ['serve', '--help']): main(c)"
    loaded = loaded_by(f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n"
                       f" {code.replace(chr(10), chr(10) + ' ')}")  # fmt: skip
    assert not loaded & {*HEAVY, "numpy", "grpc", "google", "aiohttp", "asyncio", "zmq"}


def test_importing_quire_is_cheap() -> None:
    assert not loaded_by("import quire") & {*HEAVY, "numpy", "grpc", "asyncio"}


def test_transformers_works_from_the_repository_root() -> None:
    """The folder kernels/ must not be taken for the package of that name."""
    code = (
        "import sys; sys.path.insert(0, ''); from transformers import Qwen3Config, Qwen3ForCausalLM"
        "\nQwen3ForCausalLM(Qwen3Config(vocab_size=8, hidden_size=8, intermediate_size=8, "
        "num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8))"
    )
    assert "quire_kernels" not in loaded_by(code)
