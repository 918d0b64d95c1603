"""Packages of the npm registry, as small as can be."""

import base64
import hashlib
import io
import tarfile
from pathlib import Path


def write_tgz(path: Path, files: dict[str, bytes]) -> None:
    """Write the files of a package, by their name in it."""
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def sha512(path: Path) -> str:
    """The checksum of a package, as npm writes it."""
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
