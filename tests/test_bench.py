"""experiments/bench.py, at sizes of seconds."""

import pytest
from common import script


@pytest.mark.slow
def test_bench_prints_a_row_per_value_with_its_phases():
    flags = "--shape tiny --ragged --batch 4 --response 12 --iterations 1 --vary algo=dvpo,ppo"
    done = script("experiments/bench.py", *flags.split(), "--", "--num-quantiles", "8")
    assert done.returncode == 0, done.stderr[-2000:]
    header, *rows = done.stdout.splitlines()[-3:]
    assert [row.split()[:2] for row in rows] == [["algo", "dvpo"], ["algo", "ppo"]]
    columns = dict(zip(header.replace("peak MiB", "MiB").split(), rows[0].split()[2:]))
    phases = ("rollout", "scoring", "values", "policy", "critic", "rest", "tokens/s", "MiB")
    assert all(float(columns[name]) > 0 for name in phases)
