"""Where our sources are, and what they import; shared by the rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "quire": ROOT / "quire",
    "quire_gateway": ROOT / "gateway" / "quire_gateway",
    "quire_scheduler": ROOT / "scheduler" / "quire_scheduler",
    "quire_worker": ROOT / "worker" / "quire_worker",
    "quire_kernels": ROOT / "kernels" / "quire_kernels",
}
GENERATED = ROOT / "quire" / "v1"


def modules(package: str) -> list[Path]:
    """The package's modules, generated ones left out."""
    found = sorted(PACKAGES[package].rglob("*.py"))
    return [path for path in found if GENERATED not in path.parents]


def everything() -> list[Path]:
    """All modules that run in production."""
    return [path for package in PACKAGES for path in modules(package)]


def name_of(path: Path) -> str:
    """'quire_worker.layers.rope' of a path."""
    for package, folder in PACKAGES.items():
        if folder == path or folder in path.parents:
            parts = path.relative_to(folder).with_suffix("").parts
            return ".".join((package, *(p for p in parts if p != "__init__")))
    raise ValueError(path)


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, lazy): lazy = inside a function, or only for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    yield from _imports(tree, False)


def _imports(node: ast.AST, lazy: bool) -> Iterator[tuple[str, int, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, child.lineno, lazy
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            for alias in child.names:
                yield f"{child.module}.{alias.name}", child.lineno, lazy
        inner = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        yield from _imports(child, lazy or inner or typing_only)
