"""experiments/on_gpu.py, on a CPU."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from common import refused_by
from transformers import AutoModelForCausalLM, LlamaConfig

from experiments import on_gpu
from experiments.tables import read_rows


def run_on_gpu(monkeypatch, output, *flags):
    """-> exit status, {part: its row}."""
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--small", "--output", str(output), *flags])
    with pytest.raises(SystemExit) as ended:
        on_gpu.main()
    return ended.value.code, {row["part"]: row for row in read_rows(output)}


@pytest.mark.slow
def test_every_part_of_on_gpu_answers(tmp_path, monkeypatch, warm_start, capsys):
    shutil.copytree(warm_start, tmp_path / "on" / "task" / "warm_start")
    status, rows = run_on_gpu(monkeypatch, tmp_path / "on.jsonl")
    assert status == 0 and [*rows] == ["CPU and GPU", "bf16", "tiny", "built-in task"]
    # Of the CPU with itself: replayed samples and minibatches are the recorded ones.
    assert rows["CPU and GPU"]["difference"] == 0
    assert rows["bf16"]["|ratio - 1|"] < 1e-6 and 0 < rows["bf16"]["sampling off by, most"] < 0.1
    shares = [rows["tiny"][f"decoding, {name}"] for name in on_gpu.DECODINGS]
    shares += [rows["tiny"][f"update, compiled, {tokens}"] for tokens in on_gpu.MICRO_BATCHES]
    assert all(share > 0 for share in shares)
    assert rows["tiny"]["time, DVPO / PPO"] > 0 and rows["built-in task"]["seconds"] > 0
    out = capsys.readouterr().out
    assert {*on_gpu.AIMS} <= {key for row in rows.values() for key in row}
    assert all(aim in out for aim in on_gpu.AIMS.values())


def test_on_gpu_skips_what_has_no_time_and_goes_on_behind_what_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(on_gpu, "agreement", lambda args, found: found["a part that fails"])
    monkeypatch.setattr(on_gpu, "half_precision", lambda args, found: found.update(number=0.25))
    monkeypatch.setattr(on_gpu, "MINUTES", 0.4)
    status, rows = run_on_gpu(monkeypatch, tmp_path / "on.jsonl")
    assert status == 1 and rows["CPU and GPU"]["failed"] == "'a part that fails'"
    assert rows["bf16"]["number"] == 0.25
    assert rows["tiny"]["skipped"] == "30 s wanted, 24 s left"
    assert rows["built-in task"]["skipped"] == "60 s wanted, 24 s left"
    assert "bf16            number                      0.25" in capsys.readouterr().out


def test_flags_without_a_model_are_refused(tmp_path, monkeypatch, capsys):
    flags = ("--small", "--output", tmp_path / "on.jsonl", "--", "--lam", "0.5")
    found = refused_by(on_gpu, capsys, monkeypatch, *flags)
    assert "--model: expected one for the flags behind --" in found


def test_update_share_by_hand():
    """6 (tokens (policy's body + critic) + responses x output layer) / seconds / rate."""
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=True,
    )
    policy = AutoModelForCausalLM.from_config(config)
    # Attention 4 x 16, MLP 3 x 32, three norms of 4: 172. A head of 2: 4 x 2 + 2 = 10.
    critic = SimpleNamespace(heads=torch.nn.Linear(4, 2))
    run = SimpleNamespace(policy=policy, critic=critic, data=[{"_prompt_ids": [1, 2, 3]}])
    own = SimpleNamespace(num_ppo_epochs=2, batch_size=5, response_length=7)
    flops = 6 * 2 * (5 * 10 * (172 + 172 + 10) + 5 * 7 * 40)
    assert on_gpu.update_share(run, own, 2.0, 1e6) == pytest.approx(flops / 2e6)
