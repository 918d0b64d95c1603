"""Where files are looked for: the stock model folders, and the tiny models inside this pack."""

from pathlib import Path

import folder_paths

from ...davae_core import tiny
from ...davae_core.errors import CheckpointError


def register_folders() -> None:
    """List files inside the pack beside the user's own, for stock and own loaders alike."""
    for kind, folder in tiny.FOLDERS.items():
        if folder.is_dir():
            folder_paths.add_model_folder_path(kind, str(folder))


def file_names(kind: str) -> list[str]:
    """The files a loader offers."""
    return folder_paths.get_filename_list(kind)


def file_stamp(kind: str, name: str | None) -> str:
    """For a node's ``fingerprint_inputs``: changes when the file does, so that a replaced file is loaded anew.

    A name that comes over a link is not known yet (None); then it changes when any file of this kind does.
    """
    names = file_names(kind) if name is None else [name]
    return " ".join(_stamp(folder_paths.get_full_path(kind, each)) for each in names)


def _stamp(path: str | None) -> str:
    if path is None:
        return "missing"
    info = Path(path).stat()
    return f"{path} {info.st_size} {info.st_mtime_ns}"


def check_file(kind: str, name: str | None) -> bool | str:
    """For a node's ``validate_inputs``: True, or the message of :func:`require_file`.

    A name that comes over a link is not known yet (None), and is looked for when the node runs.
    """
    try:
        if name is not None:
            require_file(kind, name)
    except CheckpointError as problem:
        return str(problem)
    return True


def require_file(kind: str, name: str) -> Path:
    """The full path of a file chosen in a loader.

    Raises:
        CheckpointError: it is not there; names the folders it may be put in. Or what came over a link is no name.
    """
    if not isinstance(name, str):
        raise CheckpointError(f"{name!r} is no file name; connect text, the name of a file in models/{kind}")
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        places = " or ".join(folder_paths.get_folder_paths(kind))
        raise CheckpointError(f"the file {name!r} was not found; it belongs into {places}. Put it there, then press R")
    return Path(path)
