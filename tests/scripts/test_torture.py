"""Some of each kind of damage; `scripts/torture_files.py` does thousands."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_damaged_and_hostile_files_are_refused_or_read_exactly():
    command = [sys.executable, str(SCRIPTS / "torture_files.py"), "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["failures"] == []
    assert report["files"] > 300
    kinds = {"attribute edited", "bytes changed", "dataset replaced", "links", ".npy header"}
    assert kinds <= set(report["kinds"])


def test_bitat_study_smoke():
    command = [sys.executable, str(SCRIPTS / "study_bitat.py"), "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (row,) = json.loads(done.stdout)
    assert row["plain sign"] + 1 < row["ascending"] < row["descending + flips"]


def test_outputs_of_every_kind_are_right_or_refused():
    command = [sys.executable, str(SCRIPTS / "torture_outputs.py"), "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = json.loads(done.stdout)
    assert report["failures"] == []
    assert len(report["cases"]) > 20
