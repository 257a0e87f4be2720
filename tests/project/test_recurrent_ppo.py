"""examples/recurrent_ppo_resets.py: both ways of training give the same numbers."""

import re
import subprocess
import sys
from pathlib import Path

from matplotlib.image import imread

from tests.support.processes import ROOT


def test_both_ways_train_alike(tmp_path: Path) -> None:
    picture = tmp_path / "curves.png"
    command = [sys.executable, ROOT / "examples" / "recurrent_ppo_resets.py", "--updates", "3", "--out", picture]
    finished = subprocess.run([*command, "--device", "cpu"], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    rows = re.findall(r"^ +\d+ +(\S+) +(\S+) +(\S+) +(\S+)$", finished.stdout, flags=re.MULTILINE)
    assert len(rows) == 3
    for loss, mean_return, loss_step_by_step, mean_return_step_by_step in rows:
        assert abs(float(loss) - float(loss_step_by_step)) < 1e-4
        assert mean_return == mean_return_step_by_step
    assert len({loss for loss, *_ in rows}) == 3, "the agents learn"
    assert "equal up to rounding for the first 3 updates" in finished.stdout
    assert re.search(r"training step by step takes \d+\.\d\d times as long \(CPU; path 'aten'", finished.stdout)
    height, width, _ = imread(picture).shape
    assert width > height > 500
