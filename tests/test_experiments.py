"""experiments/: the scripts run, at sizes of seconds."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_bench_prints_a_row_per_value_with_phases_that_add_up(tmp_path):
    command = [sys.executable, "experiments/bench.py", "--shape", "tiny", "--ragged", "--batch", "4", "--response", "12", "--iterations", "1",
               "--vary", "algo=dvpo,ppo", "--", "--num-quantiles", "8"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    header, *rows = done.stdout.splitlines()[-3:]
    assert [row.split()[:2] for row in rows] == [["algo", "dvpo"], ["algo", "ppo"]]
    columns = dict(zip(header.split(), rows[0].split()[2:]))
    phases = [float(columns[name]) for name in ("rollout", "reward", "scoring", "values", "policy", "critic", "rest")]
    assert abs(sum(phases) - float(columns["total"])) < 0.005 and min(phases) >= 0
