"""Generate the Python modules of protos/ into a folder: `scripts/protos.py FOLDER`.

Stubs are kept only for files that declare a service. Knows nothing of what the protos say.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCES = "quire/v1"


def generate(target: Path) -> list[Path]:
    """Write *_pb2.py, *_pb2.pyi and, for services, *_pb2_grpc.py; the files written."""
    protos = sorted((ROOT / "protos" / SOURCES).glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        include = [f"-I{ROOT / 'protos'}", f"-I{files('grpc_tools') / '_proto'}"]
        names = [str(p.relative_to(ROOT / "protos")) for p in protos]
        if protoc.main(["protoc", *include, *flags, *names]) != 0:
            raise SystemExit(1)
        written = []
        for path in sorted((Path(folder) / SOURCES).iterdir()):
            proto = ROOT / "protos" / SOURCES / (path.name.split("_pb2")[0] + ".proto")
            if path.name.endswith("_pb2_grpc.py") and "\nservice " not in proto.read_text():
                continue
            (target / path.name).write_bytes(path.read_bytes())
            written.append(target / path.name)
    return written


if __name__ == "__main__":
    for made in generate(Path(sys.argv[1])):
        print(made)
