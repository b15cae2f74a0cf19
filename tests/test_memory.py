"""experiments/memory.py: its formula, and what it prints."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from experiments import memory
from harness.flags import parse_args


def llama(**sizes):
    return LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)


def test_the_memory_formula_by_hand():
    config = llama(vocab_size=100, hidden_size=8, intermediate_size=20, num_hidden_layers=3)
    trunk = 100 * 8 + 3 * (2 * 8 * 8 + 2 * 4 * 8 + 3 * 20 * 8 + 2 * 8) + 8
    params, critic = trunk + 100 * 8, trunk + 4 * 200 * 9
    flags = "--model-name-or-path x --response-length 10 --batch-size 4 --micro-batch-size 2"
    found = memory.needs(config, config, parse_args(flags.split()), prompt=6)
    held = ("policy", "critic", "reference", "sampler")
    expected = [16 * params, 16 * critic, 4 * params, 2 * params]
    assert [found[name] for name in held] == expected
    assert found["casts"] == 2 * max(params, critic)
    layer = 16 * 8 + 2 * (3 * 8 + 4 * 4 + 4 * 20)
    assert found["activations"] == 2 * 16 * 3 * layer and found["logits"] == 2 * 10 * 4 * 100
    assert found["KV cache"] == 4 * 16 * 3 * 4 * 4
    update = found["casts"] + found["activations"] + found["logits"]
    assert found["peak"] == 22 * params + 16 * critic + max(found["KV cache"], update)
    flags += " --algo grpo --kl-coef 0 --gradient-checkpointing --batch-size 8"
    lean = memory.needs(config, config, parse_args(flags.split()), 6)
    assert lean["critic"] == lean["reference"] == 0
    assert lean["activations"] == 2 * 16 * (3 * 4 * 8 + layer)


def test_the_memory_formula_counts_what_a_model_keeps_for_backward():
    """Every tensor that autograd saves in a Llama's forward but its parameters: within a tenth."""
    config = llama(vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=6)
    model, kept = AutoModelForCausalLM.from_config(config), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention = torch.ones_like(ids)
        output = model.base_model(ids, attention_mask=attention).last_hidden_state
    flags = "--model-name-or-path x --response-length 60 --micro-batch-size 4 --dtype float32"
    found = memory.needs(config, config, parse_args(flags.split()), prompt=4)["activations"]
    assert output.requires_grad and found == pytest.approx(sum(kept.values()), rel=0.1)


def test_memory_takes_train_pys_flags_behind_two_dashes(tmp_path, monkeypatch, capsys):
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 20}
    llama(num_hidden_layers=3, **sizes).save_pretrained(tmp_path)
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')

    def show(*words):
        monkeypatch.setattr("sys.argv", ["memory.py", *words])
        memory.main()
        return capsys.readouterr().out

    folder = str(tmp_path)
    assert "reference         0.00 GiB" in show(folder, "--prompt", "7", "--", "--kl-coef", "0")
    assert show(folder) != show(folder, "--", "--response-length", "20000")
    # What a run has saved is a model, too, wherever that run would write by default.
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "runs" / "dialogue-dvpo-seed0" / "checkpoint-000001" / "policy"
    llama(num_hidden_layers=3, **sizes).save_pretrained(saved)
    assert show(str(saved)) == show(folder)
    for words, found in (
        ([str(tmp_path / "t5")], "model:"),
        ([folder, "--prompt", "0"], "--prompt"),
        (["nowhere"], "cannot read the config of 'nowhere'"),
        ([folder, "--", "--resume"], "--resume: expected another flag behind --"),
        ([folder, "--", "--model-name-or-path=x"], "expected another flag behind --"),
    ):
        with pytest.raises(SystemExit) as stopped:
            show(*words)
        assert stopped.value.code == 2 and found in capsys.readouterr().err
