"""Calls that must not stand in production code."""

from __future__ import annotations

import ast

import pytest

from rules.sources import ROOT, everything, imports

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
BUILTINS = {"eval", "exec", "compile"}
METHODS = {("torch", "load"), ("yaml", "load"), ("numpy", "load"), ("np", "load"), ("os", "system")}


def calls(text: str, name: str = "") -> list[str]:
    """What a module's text calls that it must not."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        where = f"{name}:{node.lineno}"
        if isinstance(node.func, ast.Name) and node.func.id in BUILTINS:
            found.append(f"{where} calls {node.func.id}")
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            if (node.func.value.id, node.func.attr) in METHODS:
                found.append(f"{where} calls {node.func.value.id}.{node.func.attr}")
        for word in node.keywords:
            shell = word.arg == "shell" and getattr(word.value, "value", None) is not False
            if shell or (word.arg == "allow_pickle"):
                found.append(f"{where} passes {word.arg}")
    return found


def test_nothing_executes_what_it_reads() -> None:
    paths = [*everything(), *(ROOT / "scripts").glob("*.py")]
    wrong = [
        found
        for path in paths
        for found in calls(path.read_text(encoding="utf-8"), str(path.relative_to(ROOT)))
    ]
    wrong += [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in paths
        for target, line, _ in imports(path)
        if target.split(".")[0] in MODULES
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "text",
    ["eval('1')", "torch.load(f)", "run(x, shell=True)", "run(x, shell=y)", "np.load(f)",
     "f(allow_pickle=True)", "os.system('ls')"],
)  # fmt: skip
def test_the_rule_sees_what_it_forbids(text: str) -> None:
    assert calls(text)
    assert not calls("run(x, shell=False)\nre.compile('x')\nmodel.eval()")
