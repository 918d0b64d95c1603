"""The environment's state and specification, and what `dev.py` says; nothing here installs anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dev as program
from harness import environment
from harness.scratch import PROBE_NAME, make_base

ROOT = Path(__file__).resolve().parents[2]


def dev(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "dev.py"), *arguments]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)


def test_requirements_leave_torch_and_documentation_to_others(tmp_path):
    lines = ["# a comment", "torch", "torchvision>=1", "comfyui-frontend-package==1.2", "comfyui-embedded-docs==3"]
    (tmp_path / "requirements.txt").write_text(
        "\n".join([*lines, "torchsde", "av>=16.0.0  # video", "pydantic~=2.0", ""])
    )
    assert environment.requirements(tmp_path) == (
        ["torchsde", "av>=16.0.0", "pydantic~=2.0"],
        ["comfyui-frontend-package==1.2"],
    )


def test_an_unfinished_environment_is_not_taken_for_a_finished_one(tmp_path, monkeypatch):
    venv, said = tmp_path / ".venv", []
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    monkeypatch.setattr(environment, "wanted_environment", lambda: (venv, "wanted"))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "_install", interrupted)
    monkeypatch.setattr(environment, "find_comfyui", lambda *_: environment.ComfyUI(tmp_path, "0", "registry"))
    start = subprocess.run  # pip is most of a venv, and none of this
    monkeypatch.setattr(subprocess, "run", lambda command, **how: start([*command, "--without-pip"], **how))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            environment.prepare(said.append)
        assert environment.read_stamp(venv) == environment.INCOMPLETE
    assert ".venv is unfinished: starting over" in said
    monkeypatch.setattr(environment, "_install", lambda *_: None)
    environment.prepare(said.append)
    assert environment.read_stamp(venv) == "wanted"
    said.clear()
    environment.prepare(said.append)
    assert said == []


def test_an_environment_behind_a_link_is_never_removed(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    environment.write_stamp(tmp_path / "theirs", "another")
    (tmp_path / ".venv").symlink_to(tmp_path / "theirs")
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    monkeypatch.setattr(environment, "wanted_environment", lambda: (tmp_path / ".venv", "wanted"))
    with pytest.raises(environment.SetupError, match=r"is a link to .*theirs"):
        environment.prepare(print)
    assert environment.read_stamp(tmp_path / "theirs") == "another"


def test_an_environment_of_somebody_else_is_never_removed(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    monkeypatch.setattr(environment, "wanted_environment", lambda: (tmp_path, "wanted"))
    with pytest.raises(environment.SetupError, match="was not made by"):
        environment.prepare(print)
    assert (tmp_path / "bin").is_dir()


def test_each_comfyui_has_its_own_environment_and_specification(comfyui, monkeypatch):
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    registry, stamp = environment.wanted_environment()
    monkeypatch.setenv("COMFYUI_DIR", str(comfyui.root))
    own, other_stamp = environment.wanted_environment()
    assert (registry.name, own.name) == (".venv", f".venv-comfyui-{comfyui.version}")
    assert stamp != other_stamp


def test_pip_failures_say_what_to_do():
    with pytest.raises(environment.SetupError, match="The command was"):
        environment.pip(Path(sys.executable), "--no-index", "no-such-distribution-at-all==0")


def test_dev_reports_a_wrong_comfyui_dir(tmp_path):
    done = dev("test", COMFYUI_DIR=str(tmp_path), COMFYUI_PYTHON="")
    assert done.returncode == 2
    assert f"COMFYUI_DIR={tmp_path}" in done.stderr
    assert "Traceback" not in done.stderr


def test_dev_reports_an_interpreter_that_cannot_be_run():
    done = dev("setup", COMFYUI_PYTHON="/no/such/python")
    assert done.returncode == 2
    assert "COMFYUI_PYTHON=/no/such/python" in done.stderr


def test_dev_test_passes_its_arguments_and_gives_back_pytests_exit_code(comfyui):
    variables = {"COMFYUI_PYTHON": sys.executable, "COMFYUI_DIR": str(comfyui.root)}
    collected = dev("test", "--collect-only", "-q", "tests/harness/test_environment.py", **variables)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    assert "test_each_comfyui_has_its_own_environment_and_specification" in collected.stdout
    assert dev("test", "tests/no_such_file.py", **variables).returncode == 4


@pytest.mark.parametrize("more", [(), ("--all",)])
def test_slow_tests_are_left_out_unless_all_are_asked_for(comfyui, more):
    variables = {"COMFYUI_PYTHON": sys.executable, "COMFYUI_DIR": str(comfyui.root)}
    collected = dev("test", "--collect-only", "-q", "tests/harness/test_server.py", *more, **variables).stdout
    assert "test_a_failing_node_is_named" in collected
    assert ("test_an_exception_leaves_no_server_behind" in collected) == bool(more)


def test_two_workers_run_the_suite_where_there_are_two_cores(monkeypatch):
    python = Path(sys.executable)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    assert program.workers(python, [])[:2] == ["--numprocesses", "2"]
    assert program.workers(python, ["tests/unit", "--all"])[:2] == ["--numprocesses", "2"]
    for alone in (["tests/test_lint.py"], ["-n0"], ["--pdb"]):
        assert program.workers(python, alone) == []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert program.workers(python, []) == []


def test_dev_help_names_every_task():
    done = dev("--help")
    assert done.returncode == 0
    assert all(f"dev.py {task}" in done.stdout for task in ("setup", "demo", "test", "ui", "bench"))


def test_a_base_directory_links_the_pack_and_survives_a_second_call(tmp_path):
    for _ in range(2):
        base = make_base(tmp_path / "base", ROOT)
        assert (base / "custom_nodes" / "comfyui-davae" / "dev.py").samefile(ROOT / "dev.py")
        assert (base / "custom_nodes" / PROBE_NAME / "__init__.py").exists()
        assert (base / "models" / "diffusion_models").is_dir()
    assert not (make_base(tmp_path / "plain", None, probe=False) / "custom_nodes" / PROBE_NAME).exists()
