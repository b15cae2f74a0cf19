"""experiments/tables.py: rows of results, and intervals."""

import json

import pytest

from experiments import tables
from experiments.tables import read_rows
from tasks import InputError


def test_rows_are_read_past_blank_lines_and_end_where_json_ends_them(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x\u2028y"}\n\n{"b": 2}\n\n')
    assert read_rows(path) == [{"a": "x\u2028y"}, {"b": 2}]
    path.write_bytes(b'{"a": 1}\n\n\xff\n')
    with pytest.raises(InputError, match="line 3: expected a JSON object, found"):
        read_rows(path)
    path.write_text('{"a": 1, "b": 2}\n{"a": 1}\n')
    assert len(read_rows(path, "a")) == 2
    with pytest.raises(InputError, match="line 2: expected a JSON object with a, b, found '.\"a"):
        read_rows(path, "a", "b")


@pytest.mark.parametrize(
    "rows,found",
    [
        (['{"seed": NaN}'], "row 1: expected another seed, found nan"),
        (['{"seed": "20"}'], "row 1: expected another seed, found '20'"),
        (['{"seed": 20.5}'], "row 1: expected another seed, found 20.5"),
        (['{"seed": -1}'], "row 1: expected another seed, found -1"),
        (['{"after": {"a": NaN}}'], "row 1: expected another after, found {'a': nan}"),
        (['{"after": {"a": 1e400}}'], "row 1: expected another after, found {'a': inf}"),
        (['{"seed": 1, "ev": [1]}', '{"seed": 1, "ev": [2]}'], "row 2: .* found row 1 again"),
        (["[" * 100_000], "line 1: expected a JSON object"),
    ],
)
def test_a_run_that_is_damaged_or_twice_is_one_line(rows, found, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows))
    with pytest.raises(InputError, match=found):
        tables.read_results(path)


def test_runs_get_the_mean_of_all_four_accuracies_and_a_byte_order_mark_is_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    three = {"in domain, greedy": 1, "in domain, sampled": 0, "out of domain, greedy": 0}
    four = three | {"out of domain, sampled": 1, "foreseen": 7}
    lines = [json.dumps({"seed": seed, "after": own}) for seed, own in enumerate((four, three))]
    path.write_text("\n".join(lines), "utf-8-sig")
    rows = tables.read_results(path, "seed")
    assert rows[0]["after"]["all four"] == 0.5
    # Fewer have no such mean, under no name.
    assert rows[1]["after"] == three


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_row_is_added_on_a_line_of_its_own(tmp_path, end):
    path = tmp_path / "rows.jsonl"
    tables.add_row(path, {"a": 1})
    path.write_text(path.read_text().rstrip() + end)
    tables.add_row(path, {"b": 2})
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n'


def test_the_interval_is_students():
    """1, 2, 3: standard error 1 / sqrt(3), t(2) = 4.30."""
    assert tables.interval([1.0, 2.0, 3.0]) == (2, pytest.approx(4.30 / 3**0.5))
