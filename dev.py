#!/usr/bin/env python3
"""Tasks of this repository, with nothing but Python 3.10 or newer:

    python dev.py setup    make the environment: a ComfyUI, torch, what both need, the test tools
    python dev.py demo     run the nodes in a real ComfyUI and write images
    python dev.py test     run the tests, in two workers where there are two cores; --all adds the slow ones;
                           arguments go to pytest
    python dev.py ui       serve ComfyUI with the pack on this machine
    python dev.py bench    time the models beside what a user would run instead; --help tells the arguments
    python dev.py soak     disturb a server while it draws (--minutes N), or read damaged files with every loader and
                           converter (--files N)

Each task makes the environment first if it is not complete; interrupting it does no harm.

Environment variables:
    COMFYUI_DIR     a ComfyUI of your own; default: a copy from the package registry
    COMFYUI_PYTHON  an interpreter that has everything ComfyUI needs; nothing is installed then
    CHROMIUM        the browser of the browser tests; default: the one in the PATH
    DAVAE_NODES2    1: the browser tests draw nodes as "Nodes 2.0" (a newer ComfyUI of your own)
    DAVAE_CACHE     where fetched things are kept; default: .cache
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

if sys.version_info < (3, 10):  # noqa: UP036  said before anything that an older Python cannot read
    sys.exit(f"dev.py needs Python 3.10 or newer; this is {sys.version.split()[0]}")

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from harness import chromium, environment  # noqa: E402
from harness.launch import HOST, server_command, server_environment  # noqa: E402
from harness.locate import LocateError, cache_dir  # noqa: E402
from harness.scratch import make_base  # noqa: E402
from harness.torch_build import has_nvidia_gpu  # noqa: E402


def say(line: str) -> None:
    """Tells the person at the terminal what is being done."""
    print(f"dev.py: {line}", flush=True)


def setup(_: argparse.Namespace) -> int:
    """Makes the environment."""
    comfyui, python = environment.prepare(say)
    say(f"ready: ComfyUI {comfyui.version} ({comfyui.root}) with {python}")
    if chromium.find_chromium() is None:
        say(chromium.MISSING)
    return 0


def demo(options: argparse.Namespace) -> int:
    """Runs the demo."""
    _, python = environment.prepare(say)
    arguments = ["--out", str(Path(options.out).resolve())]
    for prompt in options.prompt:
        arguments += ["--prompt", prompt]
    if options.seed is not None:
        arguments += ["--seed", str(options.seed)]
    return run([str(python), "-m", "harness.demo", *arguments, *options.rest])


def test(options: argparse.Namespace) -> int:
    """Runs pytest and gives back its exit code."""
    _, python = environment.prepare(say)
    if os.environ.get("COMFYUI_PYTHON") and subprocess.run([str(python), "-c", "import pytest"]).returncode:
        raise environment.SetupError(
            f"{python} (COMFYUI_PYTHON) has no pytest: install it there, or unset the variable."
        )
    if chromium.find_chromium() is None:
        say(chromium.MISSING)
    return run([str(python), "-m", "pytest", *workers(python, options.rest), *(options.rest or ["tests"])])


def workers(python: Path, arguments: list[str]) -> list[str]:
    """What makes pytest use two processes: where there are two cores, for the suite or its folders, not for a file."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = any(argument.startswith(("-n", "--numprocesses", "--dist")) for argument in arguments)
    watched = {"--pdb", "--trace", "-s", "--capture=no"} & set(arguments)
    if cores < 2 or chosen or watched or any(".py" in argument for argument in arguments):
        return []
    if subprocess.run([str(python), "-c", "import xdist"], capture_output=True).returncode:
        say(f"{python} has no pytest-xdist: the tests run in one process")
        return []
    return ["--numprocesses", "2", "--dist", "loadscope", "--no-loadscope-reorder"]


def ui(options: argparse.Namespace) -> int:
    """Serves ComfyUI with the pack until Ctrl-C."""
    comfyui, python = environment.prepare(say)
    base = make_base(cache_dir() / f"ui-{comfyui.version}", ROOT, probe=False)
    say(f"models, input and output of this ComfyUI {comfyui.version} are in {base}")
    say(f"serving on http://{HOST}:{options.port}; Ctrl-C ends it")
    cpu = sys.platform != "darwin" and not has_nvidia_gpu()
    return run(server_command(python, comfyui, base, options.port, cpu), cwd=base, env=server_environment())


def bench(options: argparse.Namespace) -> int:
    """Runs the benchmarks and gives back their exit code: 1 where a bound is not kept."""
    _, python = environment.prepare(say)
    return run([str(python), "-m", "benchmarks", *options.rest])


def soak(options: argparse.Namespace) -> int:
    """Runs the server soak, or the fuzzers, and gives back their exit code: 1 where something was found."""
    _, python = environment.prepare(say)
    fuzzers = any(argument.startswith(("--files", "--only")) for argument in options.rest)
    return run([str(python), "-m", "harness.soak" if fuzzers else "harness.soak.server", *options.rest])


def run(command: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None) -> int:
    """Runs a command in the foreground; Ctrl-C is the command's to handle. Returns its exit code."""
    process = subprocess.Popen(command, cwd=cwd, env=env)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def parse(argv: list[str]) -> argparse.Namespace:
    """Reads the command line; what a task does not know itself lands in `rest`."""
    parser = argparse.ArgumentParser(
        prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(metavar="TASK", required=True)

    def task(function, help: str) -> argparse.ArgumentParser:
        added = tasks.add_parser(function.__name__, help=help, description=help)
        added.set_defaults(task=function)
        return added

    task(setup, "make the environment, or complete it")
    demo_parser = task(demo, "run the nodes in a real ComfyUI and write images")
    demo_parser.add_argument(
        "--prompt", metavar="TEXT", action="append", default=[], help="what to draw; may be given several times"
    )
    demo_parser.add_argument("--seed", metavar="N", type=int, help="noise seed (default: the workflow's)")
    demo_parser.add_argument(
        "--out", metavar="DIR", default="output/demo", help="where the images go (default: %(default)s)"
    )
    tests = task(test, "run the tests but for the slow ones; all arguments go to pytest (default: tests)")
    tests.usage = "dev.py test [--all] [--precision bf16 | fp32] [-n WORKERS] [pytest arguments]"
    benches = task(bench, "time the models beside what a user would run instead; all arguments go to the benchmarks")
    benches.usage = "dev.py bench [--quick | --long] [--json FILE] ..."
    soaks = task(soak, "disturb a server while it draws, or, with --files, read damaged files with every loader")
    soaks.usage = "dev.py soak [--minutes N] [--seed N] ... | --files N [--seed N] ..."
    ui_parser = task(ui, "serve ComfyUI with the pack on this machine")
    ui_parser.add_argument("--port", type=int, default=8188, help="default: %(default)s")

    if argv[:1] in (["bench"], ["soak"]) or (argv[:1] == ["test"] and argv[1:] not in (["-h"], ["--help"])):
        options = parser.parse_args(argv[:1])
        options.rest = argv[1:]
        return options
    options, options.rest = parser.parse_known_args(argv)
    if options.rest and options.task is not demo:
        parser.error(f"unknown arguments: {' '.join(options.rest)}")
    return options


def main(argv: list[str]) -> int:
    """Runs one task; returns the exit code."""
    options = parse(argv)
    try:
        return options.task(options)
    except (environment.SetupError, LocateError, FileNotFoundError) as error:
        print(f"dev.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dev.py: interrupted; run it again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
