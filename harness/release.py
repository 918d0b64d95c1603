"""The package that the ComfyUI registry gets, built as ``comfy node pack`` builds it. Standard library only.

What comfy-cli 1.x does (its ``zip_files``): it takes the files that git tracks, as they are in the working tree, leaves
out those that match `.comfyignore` (in gitignore's syntax), adds the folders named by ``includes`` in `pyproject.toml`
(there are none here), and packs them under their names in the repository, without a folder above them. The registry
unpacks that into ``custom_nodes/<project name>``, the name in small letters and with "-" as its only separator.

Of gitignore's syntax, `.comfyignore` uses one form alone: a path from the top, that begins with a slash.
"""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path


class ReleaseError(RuntimeError):
    """The package cannot be built; the message says why."""


def left_out(root: Path) -> list[str]:
    """The paths in `.comfyignore`, without their first slash; those of folders end with one.

    Raises:
        ReleaseError: a pattern is of another form.
    """
    lines = [line.strip() for line in (root / ".comfyignore").read_text(encoding="utf-8").splitlines()]
    patterns = [line for line in lines if line and not line.startswith("#")]
    for pattern in patterns:
        if not re.fullmatch(r"/[\w./-]+", pattern):
            raise ReleaseError(f"{pattern!r} in .comfyignore: write a path that begins with a slash, without wildcards")
    return [pattern[1:] for pattern in patterns]


def files(root: Path) -> list[str]:
    """The files of the package, by their path from the repository's top.

    Raises:
        ReleaseError: git does not know the folder.
    """
    command = ["git", "-C", str(root), "ls-files", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as problem:
        raise ReleaseError(f"{root}: only a git checkout can be packed: {problem}") from problem
    tracked = [name for name in done.stdout.decode("utf-8").split("\0") if name]
    out = left_out(root)
    return [name for name in tracked if not is_left_out(name, out) and (root / name).is_file()]


def is_left_out(name: str, out: list[str]) -> bool:
    """Whether a file is one of the paths of :func:`left_out`, or in one of its folders."""
    return any(name == path or name.startswith(path.rstrip("/") + "/") for path in out)


def install_name(root: Path) -> str:
    """The folder that the registry's package is unpacked into: the normalised project name."""
    found = re.search(r'^\[project\]\nname = "([^"]+)"', (root / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    if found is None:
        raise ReleaseError("pyproject.toml does not begin its [project] table with the name")
    return re.sub(r"[-_.]+", "-", found.group(1)).lower()


def pack(root: Path, target: Path) -> Path:
    """Writes the package to the zip file `target` and returns it."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in files(root):
            archive.write(root / name, name)
    return target


def install(package: Path, folder: Path) -> Path:
    """Unpacks a package into the new folder `folder`, as the registry's client does."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(package) as archive:
        archive.extractall(folder)
    return folder
