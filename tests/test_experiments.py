"""experiments/: the scripts run, at sizes of seconds."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_bench_prints_a_row_per_value_with_its_phases():
    command = [sys.executable, "experiments/bench.py", "--shape", "tiny", "--ragged", "--batch", "4", "--response", "12", "--iterations", "1",
               "--vary", "algo=dvpo,ppo", "--", "--num-quantiles", "8"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    header, *rows = done.stdout.splitlines()[-3:]
    assert [row.split()[:2] for row in rows] == [["algo", "dvpo"], ["algo", "ppo"]]
    columns = dict(zip(header.replace(" %", "%").replace("peak MiB", "MiB").split(), rows[0].split()[2:]))
    assert all(float(columns[name]) > 0 for name in ("rollout", "scoring", "values", "policy", "critic", "rest", "tokens/s", "MiB"))


def test_the_noise_laboratory_runs_skips_what_is_finished_and_prints_paired_differences():
    (ROOT / "runs" / "noise-quick.jsonl").unlink(missing_ok=True)
    command = [sys.executable, "experiments/noise.py", "--quick", "--jobs", "2"]
    for todo in ("12/12", "0it"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and todo in done.stderr, done.stderr[-2000:]
    assert len((ROOT / "runs" / "noise-quick.jsonl").read_text().splitlines()) == 12
    rows = [line for line in done.stdout.splitlines() if line.startswith(("none", "offset"))]
    assert len(rows) == 6 and "0.000 [0.000, 0.000]" in rows[0] and (ROOT / "runs" / "noise-quick-dots.png").exists()
