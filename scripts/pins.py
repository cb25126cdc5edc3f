"""Write constraints.txt: the exact versions of all that `quire[dev]` needs, from this .venv.

`make lock` runs it after somebody changed a version on purpose. Leaves out what was installed
for other reasons. Knows no resolver: it walks the installed metadata.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOTS = ("quire[dev]", "hatchling", "editables")
# torch's CUDA build asks for exactly this one, and a constraint must fit both builds
FIXED = {"triton": "3.7.1"}
HEAD = """\
# Exact versions of everything Quire installs; `make lock` writes this file.
# torch has no local version, so that a CPU or a CUDA build of the same version fits.
"""


def main() -> int:
    pins: dict[str, str] = {}
    todo, seen = [Requirement(root) for root in ROOTS], set()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            print(f"not installed: {requirement}", file=sys.stderr)
            return 1
        if key[0] not in ("quire", "pip"):  # pip is the virtual environment's own
            pins[key[0]] = FIXED.get(key[0], found.version.partition("+")[0])
        for text in found.requires or ():
            child = Requirement(text)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": e}) for e in extras):
                todo.append(child)
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    path = Path(__file__).resolve().parent.parent / "constraints.txt"
    path.write_text(HEAD + "".join(lines))
    print(f"{path.name}: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
