"""The stubs say what the module has, and the Python part is typed."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1]


def test_stubs_are_those_of_the_native_module() -> None:
    command = [sys.executable, "-m", "mypy.stubtest", "respodiff", "--ignore-missing-stub"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE / "tests")
    assert done.returncode == 0, done.stdout


def test_types() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy"], capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout
