"""Python in a process of its own, in which Triton compiles: that of the tests may have been told to interpret."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def output_of_python(*arguments: str, cwd: Path = ROOT) -> str:
    """What `python ARGUMENTS`, started in the project's folder or a copy of it, prints; it has to end well."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
