"""harness/setup.py: a model, data and rewards of one's own, and bad input in one line."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from common import (
    SMALL,
    few_rows,
    log,
    own,
    refused,
    rows_of,
    run_of,
    tiny_config,
    write_rows,
)
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    Gemma3Config,
    MixtralConfig,
    OPTConfig,
    PhimoeConfig,
    T5Config,
)

import tasks.warm_start
import train
from harness import checkpoints, setup
from harness.flags import parse_args
from harness.setup import build, load_splits
from risk import RiskConfig
from tasks import InputError
from tasks.builtin import SLOTS, task_tokenizer
from tasks.prompts import load_data


def test_a_folder_a_file_and_a_python_reward(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own_reward.py").write_text("""
def f(prompts, completions, level, **columns):
    return [level[0] + len(completion[-1]["content"]) for completion in completions]
""")
    data = write_rows(tmp_path / "data.jsonl", rows_of(level=3))
    argv = own(model_folder, data, "own_reward:f")
    more = "--gradient-checkpointing --eval-steps 1 --output-dir run"
    assert train.main([*argv, *more.split()]) == 0
    row = log(tmp_path / "run")[0]
    assert row["objective/scores"] >= 3 and "eval/held_out/greedy" in row


def test_a_users_own_user_and_reward_for_conversations(model_folder, tmp_path, monkeypatch):
    (tmp_path / "talk.py").write_text("""
def user(messages, name):
    return name if len(messages) < 4 else None


def reward(prompts, completions, name):
    return [float(len(completion)) for completion in completions]
""")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"book {slot}", "name": f"{slot} two"} for slot in SLOTS]
    argv = own(model_folder, write_rows(tmp_path / "data.jsonl", rows), "talk:reward")
    more = "--user talk:user --output-dir run --missing-eos-penalty 1"
    assert train.main([*argv, *more.split()]) == 0
    assert all(1 <= row["objective/true_scores"] <= 5 for row in log(tmp_path / "run"))


def test_parquet_and_an_evaluation_set(model_folder, tmp_path):
    Dataset.from_list(rows_of()).to_parquet(tmp_path / "data.parquet")
    evaluation = write_rows(tmp_path / "eval.json", rows_of(3))
    argv = own(model_folder, tmp_path / "data.parquet", "exact")
    more = f"--eval-dataset-name {evaluation} --critic-model-name-or-path {model_folder}"
    assert train.main([*argv, *more.split(), "--output-dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["before"].keys() == {"held out, greedy", "held out, sampled"}


def like_the_hub(folder):
    """A data set of two configs with two splits each, as the hub's gsm8k is one."""
    configs = []
    for config in ("main", "socratic"):
        files = []
        for split, first in (("train", 0), ("test", 8)):
            path = folder / config / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            questions = [f"area {'north ' * i}{config}" for i in range(first, first + 4)]
            row = {"answer": "so\n#### 1", "prompt": 7}
            write_rows(path, [{"question": question, **row} for question in questions])
            files.append({"split": split, "path": f"{config}/{split}.jsonl"})
        configs.append({"config_name": config, "data_files": files})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return folder


def test_a_data_set_as_the_hub_has_them_with_a_config_and_a_column_of_another_name(
    model_folder, tmp_path, capsys
):
    hub = like_the_hub(tmp_path / "gsm")
    flags = [*own(model_folder, hub, "math"), "--output-dir", str(tmp_path / "run")]
    held_out = [{"question": "area east", "answer": "1"}, {"question": "area", "answer": "1"}]
    held_out = write_rows(tmp_path / "held_out.jsonl", held_out)
    right = f"--dataset-config main --prompt-column question --eval-dataset-name {held_out}".split()
    args = parse_args([*flags, *right])
    data, evals = load_splits(args, AutoTokenizer.from_pretrained(model_folder), 64)
    assert sorted(data["prompt"]) == sorted(f"area {'north ' * i}main" for i in range(4))
    assert evals["held out"]["prompt"] == ["area east", "area"]
    args = parse_args([*flags, *right[:4], "--dataset-split", "test"])
    data, evals = load_splits(args, AutoTokenizer.from_pretrained(model_folder), 64)
    assert len(data) == len(evals["held out"]) == 2
    both = ["--eval-dataset-name", str(hub), "--eval-dataset-split", "test"]
    args = parse_args([*flags, *right[:4], *both])
    _, evals = load_splits(args, AutoTokenizer.from_pretrained(model_folder), 64)
    assert all("main" in prompt for prompt in evals["held out"]["prompt"])
    assert train.main([*flags, *right]) == 0
    refused(capsys, [*flags, "--prompt-column", "question"], "--dataset-name", "main")
    wrong = "--dataset-config main --prompt-column query".split()
    refused(capsys, [*flags, *wrong], "--dataset-name", "'query'", "--prompt-column")


def test_an_edited_folder_is_read_again(tmp_path):
    """datasets knows a folder with a README by both their names."""
    folder = like_the_hub(tmp_path / "gsm")
    options = {"config": "main", "prompt_column": "question"}
    assert "edited" not in load_data(str(folder), "test", **options)["prompt"]
    write_rows(folder / "main" / "test.jsonl", [{"question": "edited", "answer": "1"}])
    assert load_data(str(folder), "test", **options)["prompt"] == ["edited"]


def test_a_time_in_a_message_is_kept_as_a_text(model_folder, tmp_path):
    """A checkpoint's state holds examples, which torch.load reads as plain types alone."""
    said = [{"role": "user", "content": "area", "time": "2024-01-01T10:00:00"}]
    rows = [{"prompt": said, "answer": "a"}, {"prompt": said[:1] * 2, "answer": "a"}]
    data = write_rows(tmp_path / "d.jsonl", rows * 2)
    flags = [*own(model_folder, data, "exact"), "--output-dir", str(tmp_path / "run")]
    assert train.main(flags) == 0
    assert train.main(["--resume", str(tmp_path / "run")]) == 0


def test_held_out_prompts_stay_out_of_training(warm_start, tmp_path):
    run, _ = run_of(warm_start, tmp_path)
    held_out = set(map(str, run.evals["in domain"]["prompt"]))
    assert len(held_out) == 384 and len(run.data) > 3500
    assert not held_out & set(map(str, run.data["prompt"]))


def test_rows_that_are_held_out_too_are_left_out_with_a_count(model_folder, tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", rows_of())
    write_rows(tmp_path / "eval.jsonl", rows_of()[:2])
    flags = f"--eval-dataset-name {tmp_path}/eval.jsonl --output-dir {tmp_path}"
    run = build(parse_args([*own(model_folder, data, "exact"), *flags.split()]))
    assert len(run.data) == 10
    assert "--dataset-name: 2 of 12 rows left out, as held out too" in capsys.readouterr().out


def test_a_users_own_label_column_is_just_a_column(model_folder, tmp_path):
    seen = []

    def noting(prompts, completions, answer, label, **columns):
        seen.append((answer, label))
        return [0.0] * len(prompts)

    data = write_rows(tmp_path / "d.jsonl", rows_of(label="mine"))
    more = f"--output-dir {tmp_path / 'run'} --pseudo-label-noise 0.5"
    args = parse_args([*own(model_folder, data, "exact"), *more.split()])
    run = build(args)
    run.reward = noting
    train.collect(run, args)
    true, noisy = seen
    assert true[1] == noisy[1] == ["mine"] * 8 and true[0] != noisy[0]


def test_dropout_is_off_even_in_train_mode_and_weights_are_fp32(model_folder, tmp_path):
    """The folder's GPT-2 has dropout 0.1 in its config; a bf16 copy of it is trained in fp32."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.config.resid_pdrop == 0.1
    model.bfloat16().save_pretrained(tmp_path)
    policy = setup.load(AutoModelForCausalLM, str(tmp_path), "--model-name-or-path").train()
    ids = torch.arange(6)[None]
    assert torch.equal(policy(ids).logits, policy(ids).logits)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def phimoe(vocab_size):
    """As it comes, its experts are drawn in train mode, by a noise that is not called dropout."""
    return PhimoeConfig(**SIZES, vocab_size=vocab_size, num_local_experts=4)


def gemma3(vocab_size):
    """A config of configs: what matters stands in the text's."""
    text = {**SIZES, "head_dim": 8, "vocab_size": vocab_size, "attention_dropout": 0.5}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


def mixtral(vocab_size):
    """Asked for its routers' logits, it computes a loss that generate has no shapes for."""
    switches = {"output_router_logits": True, "router_jitter_noise": 0.1}
    return MixtralConfig(**SIZES, vocab_size=vocab_size, num_local_experts=4, **switches)


def opt(vocab_size):
    """It ends in a projection: its outputs are narrower than its hidden states."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 64, "layerdrop": 0.5}
    sizes |= {"do_layer_norm_before": False, "eos_token_id": 1, "bos_token_id": 2}
    return OPTConfig(**sizes, vocab_size=vocab_size)


@pytest.mark.parametrize("family", [phimoe, gemma3, mixtral, opt])
def test_families_that_are_built_otherwise_are_trained_like_any(family, tmp_path):
    """Nothing is drawn in train mode: the first ratio is 1; the end can be saved."""
    folder = saved_model(tmp_path / "model", config=family)
    policy = setup.load(AutoModelForCausalLM, folder, "--model-name-or-path").train()
    assert setup.context_of(policy) == 64
    ids = torch.arange(3, 9)[None]
    assert torch.equal(policy(ids).logits, policy(ids).logits)
    data = write_rows(tmp_path / "data.jsonl", rows_of())
    once = "--num-mini-batches 1 --num-ppo-epochs 1".split()
    argv = [*own(folder, data, "exact"), *once, "--output-dir", str(tmp_path / "run")]
    assert train.main(argv) == 0
    assert log(tmp_path / "run")[0]["val/ratio"] == pytest.approx(1, abs=1e-5)


def test_switches_of_a_saved_config_change_nothing(tmp_path):
    """Of outputs that nobody asked for, and of their kind."""
    folder = saved_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    (folder / "config.json").write_text(json.dumps(config))
    policy = setup.load(AutoModelForCausalLM, folder, "--model-name-or-path")
    assert [*policy(torch.arange(6)[None], use_cache=False)] == ["logits"]
    (folder / "config.json").write_text(json.dumps(config | {"is_encoder_decoder": True}))
    with pytest.raises(InputError, match="--model-name-or-path: .*expected a decoder alone"):
        setup.load(AutoModelForCausalLM, folder, "--model-name-or-path")


def test_generation_settings_that_cannot_be_saved_are_dropped(tmp_path):
    """Llama 2 comes with such; settings that can be saved stay what they are."""
    folder = saved_model(tmp_path / "model")
    path = folder / "generation_config.json"
    ids = json.loads(path.read_text())
    path.write_text(json.dumps({**ids, "do_sample": True, "temperature": 0.6, "top_p": 0.9}))
    policy = setup.load(AutoModelForCausalLM, folder, "--model-name-or-path")
    assert policy.generation_config.temperature == 0.6
    for settings in ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "length_penalty": 2}):
        path.write_text(json.dumps({**ids, **settings}))
        policy = setup.load(AutoModelForCausalLM, folder, "--model-name-or-path")
        assert policy.generation_config.eos_token_id == 1
        policy.save_pretrained(tmp_path / "saved")
    data = write_rows(tmp_path / "data.jsonl", rows_of())
    argv = [*own(folder, data, "exact"), "--output-dir", str(tmp_path / "run")]
    assert train.main(argv) == 0


# ---- the start-up check


def check(folder, tmp_path, *flags):
    """What is asked of a model before its run begins."""
    data = write_rows(tmp_path / "data.jsonl", rows_of())
    args = parse_args([*own(folder, data, "exact"), "--output-dir", str(tmp_path), *flags])
    return build(args)


def short_gpt2(vocab_size):
    config = tiny_config("gpt2", vocab_size)
    config.n_positions = 9
    return config


def test_what_is_asked_of_a_model_fits_its_context(tmp_path):
    """GPT-2 has no position behind the last."""
    folder = saved_model(tmp_path / "model", config=short_gpt2)
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "area", "answer": "x"}] * 9)
    more = f"--response-length 4 --output-dir {tmp_path} --eval-dataset-name {tmp_path}/eval.jsonl"
    write_rows(tmp_path / "eval.jsonl", [{"prompt": "food", "answer": "x"}])
    assert build(parse_args([*own(folder, data, "exact"), *more.split()])).trust_recorded


def bert(vocab_size, **more):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 64, "eos_token_id": 1}
    return BertConfig(**sizes, vocab_size=vocab_size, initializer_range=0.2, **more)


def bart(vocab_size):
    """Its positions count padding, whatever it is told."""
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 2}
    sizes |= {"decoder_ffn_dim": 32, "max_position_embeddings": 64, "init_std": 0.2}
    return BartConfig(**sizes, vocab_size=vocab_size, is_decoder=True, eos_token_id=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_draws_in_train_mode_is_refused(model_folder, tmp_path, dtype, monkeypatch):
    """By a source of chance that nobody has thought of: here GPT-2's dropout, left on."""
    flags = ("--dtype", dtype)
    check(model_folder, tmp_path, *flags)
    monkeypatch.setattr(setup, "turn_off", lambda config: None)
    found = "--model-name-or-path: expected chance in training to change nothing"
    with pytest.raises(InputError, match=found):
        check(model_folder, tmp_path, *flags)
    with pytest.raises(InputError, match=found):
        check(model_folder, tmp_path, *flags, "--gradient-checkpointing")


@pytest.mark.parametrize("config", [bert, bart])
def test_a_model_to_which_padding_or_later_tokens_matter_is_refused(config, tmp_path):
    folder = saved_model(tmp_path / "model", config=config)
    with pytest.raises(InputError, match="--model-.*: expected padding or later tokens to change"):
        check(folder, tmp_path)


def test_a_critic_that_looks_ahead_is_refused(model_folder, tmp_path):
    """Or reads no text: each in one line. As a decoder, BERT will do."""
    folder, vocab_size = tmp_path / "bert", len(task_tokenizer("dialogue"))
    named = ("--critic-model-name-or-path", str(folder))
    AutoModel.from_config(bert(vocab_size)).save_pretrained(folder)
    with pytest.raises(InputError, match="--critic-.*: expected padding or later tokens"):
        check(model_folder, tmp_path, *named)
    AutoModel.from_config(bert(vocab_size, is_decoder=True)).save_pretrained(folder)
    assert check(model_folder, tmp_path, *named).critic.heads.in_features == 32
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    AutoModel.from_config(T5Config(vocab_size=40, **sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match="--critic-model-name-or-path: .*a decoder alone"):
        check(model_folder, tmp_path, named[0], str(tmp_path / "t5"))


def test_weights_that_are_missing_are_not_made_up(model_folder, tmp_path):
    """Not those of a policy's head, which a trunk has not; not those of a layer."""
    folder = saved_model(tmp_path / "model")
    whole = load_file(folder / "model.safetensors")
    critic = ("--critic-model-name-or-path", str(folder))
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        some = {key: value for key, value in whole.items() if key != name}
        save_file(some, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"--model-name.*expected all weights, .* {name}"):
            check(folder, tmp_path)
        if name == "lm_head.weight":
            check(model_folder, tmp_path, *critic)
    with pytest.raises(InputError, match="--critic-model-.* found no layers.0.mlp.up_proj.weight"):
        check(model_folder, tmp_path, *critic)


# ---- ids

BAD_ENDS = ["x", -1, 1.5, [1, "x"], [[1]], {"a": 1}, 32, [1, 10**9]]


@pytest.mark.parametrize("end", BAD_ENDS)
def test_an_end_of_sequence_that_is_no_id_of_the_model_is_refused(end, tmp_path):
    folder = saved_model(tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": end}))
    with pytest.raises(InputError, match="--stop-token: expected .* ids below 32, found"):
        check(folder, tmp_path)


def test_tokens_that_were_added_without_an_embedding_fill_no_padding_and_end_nothing(tmp_path):
    folder = saved_model(tmp_path / "model", pad_token="[PAD]")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == 32
    run = check(folder, tmp_path)
    assert run.stop_ids == [1]  # the first of them fills the padding
    with pytest.raises(InputError, match="--stop-token: expected .* ids below 32"):
        check(folder, tmp_path, "--stop-token", "[PAD]")
    tokenizer.add_special_tokens({"eos_token": "[EOS]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="--stop-token: expected .* ids below 32"):
        check(folder, tmp_path)


def test_a_damaged_warm_start_is_made_again_or_refused(warm_start, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.warm_start, "fine_tune", lambda *rest, **named: [])
    monkeypatch.setattr(tasks.warm_start, "task_rows", few_rows)
    shutil.copytree(warm_start, tmp_path / "warm_start")
    argv = [*SMALL, "--output-dir", str(tmp_path)]
    (tmp_path / "warm_start" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load '.*warm_start': .*model.safetensors"):
        build(parse_args(argv))
    (tmp_path / "warm_start" / "settings.json").write_bytes(b"\xff\xfe{}")
    build(parse_args(argv))
    settings = [folder / "settings.json" for folder in (warm_start, tmp_path / "warm_start")]
    assert settings[0].read_text() == settings[1].read_text()


def test_weights_that_are_not_fp32_are_refused(warm_start, tmp_path, monkeypatch):
    """Adam steps of 1e-6 vanish in bf16 weights."""
    load = setup.load

    def in_half(kind, *rest):
        found = load(kind, *rest)
        return found.bfloat16() if kind is AutoModelForCausalLM else found

    monkeypatch.setattr(setup, "load", in_half)
    with pytest.raises(AssertionError, match="bf16"):
        run_of(warm_start, tmp_path, build=build)


def test_recorded_logprobs_that_differ_from_scored_ones_are_not_trusted(
    warm_start, tmp_path, monkeypatch
):
    """An architecture that decodes otherwise than it reads: its tokens are scored.

    The first ratio is 1 all the same.
    """
    sample = setup.sample

    def shifted(*rest, **named):
        rollout = sample(*rest, **named)
        if rollout.logprobs is not None:
            rollout.logprobs = rollout.logprobs - 0.01 * rollout.mask
        return rollout

    monkeypatch.setattr(setup, "sample", shifted)
    once = "--num-mini-batches 1 --num-ppo-epochs 1 --critic-warmup-steps 0".split()
    run, args = run_of(warm_start, tmp_path, *once, build=build)
    assert run.trust_recorded is False
    experience, _ = train.collect(run, args)
    assert train.update(run, args, experience)["val/ratio"].item() == pytest.approx(1, abs=1e-5)


def test_what_is_asked_of_sampling_changes_no_generator(warm_start, tmp_path):
    run, args = run_of(warm_start, tmp_path)
    before = torch.get_rng_state()
    assert run.trust_recorded and setup.sampling_is_scoring(run, args)
    assert torch.equal(torch.get_rng_state(), before)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.2}


def llama(vocab_size):
    return tiny_config("llama", vocab_size)


def saved_model(folder, config=llama, **changes):
    """A tiny model and tokenizer in a folder, with the tokenizer's attributes changed."""
    tokenizer = task_tokenizer("dialogue")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(len(tokenizer))).save_pretrained(folder)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokenizers_without_pad_or_template_and_with_added_tokens(tmp_path, capsys):
    areas = [{"prompt": f"area {area}", "answer": "x"} for area in SLOTS["area"]]
    data = write_rows(tmp_path / "data.jsonl", areas)
    bare = saved_model(tmp_path / "bare", pad_token=None, chat_template=None)
    argv = [*own(bare, data, "exact"), "--output-dir", str(tmp_path / "run")]
    assert train.main(argv) == 0
    refused(capsys, [*argv, "--user", "json:dumps"], "--user", "chat template for all turns")
    chat = write_rows(tmp_path / "chat.jsonl", rows_of())
    refused(capsys, [*argv, "--dataset-name", chat], "row 0", "chat_template is not set")
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.add_tokens(["sushi"])
    tokenizer.save_pretrained(bare)
    assert train.main(argv) == 0  # as long as nobody says it
    write_rows(
        tmp_path / "data.jsonl", [{**row, "prompt": row["prompt"] + " food sushi"} for row in areas]
    )
    refused(capsys, argv, "--model-name-or-path", "token ids below 32", "found 32", "sushi")


def test_code_of_a_model_and_pickles_never_run(tmp_path, capsys, monkeypatch):
    """Nor is anyone asked whether they may."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *rest: "y")
    folder = saved_model(tmp_path / "own")
    (folder / "own.py").write_text(f"""
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({str(tmp_path / "ran")!r}).touch()
class OwnConfig(LlamaConfig): model_type = "own"
class OwnModel(LlamaForCausalLM): config_class = OwnConfig
""")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    data = write_rows(tmp_path / "data.jsonl", rows_of())
    argv = [*own(folder, data, "exact"), "--output-dir", str(tmp_path / "run")]
    refused(capsys, argv, "--model-name-or-path", "code")
    assert not (tmp_path / "ran").exists()
    pickled = saved_model(tmp_path / "pickled")
    numbers = AutoModelForCausalLM.from_pretrained(pickled).state_dict()
    torch.save(numbers, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    argv = own(pickled, data, "exact")
    refused(capsys, argv, "--model-name-or-path", "model.safetensors")


def test_overlong_prompts_are_left_out_with_a_count(model_folder, tmp_path, capsys):
    rows = [*rows_of(4), {"prompt": LONG, "answer": "x"}, *rows_of(6)[4:]]
    data = write_rows(tmp_path / "data.jsonl", rows)
    assert train.main([*own(model_folder, data, "exact"), "--output-dir", str(tmp_path)]) == 0
    assert re.search("--dataset-name: 1 of 7 prompts .* 60", capsys.readouterr().out)


def test_equal_rows_ids_and_unknown_words_are_just_data(model_folder, tmp_path):
    rows = [*rows_of(6) * 2, {"prompt": "what is this", "answer": "x"}]
    data = write_rows(tmp_path / "data.jsonl", [{"id": 7, **row} for row in rows])
    assert train.main([*own(model_folder, data, "exact"), "--output-dir", str(tmp_path)]) == 0


LONG = [{"role": "user", "content": "area north " * 40}]  # 80 words and two of the template


ONE = [{"prompt": "area", "answer": "x"}]


BAD_DATA = [
    ([], "", ["--dataset-name"]),
    ([{"question": "x"}], "", ["--dataset-name", "'prompt'", "question"]),
    ([{"prompt": LONG, "answer": "x"}], "", ["--dataset-name", "82 tokens", "at most 60"]),
    ([{"prompt": "", "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": None, "answer": "x"}], "", ["row 0", "prompt", "None"]),
    (ONE + [{"prompt": None, "answer": "x"}], "", ["row 1", "prompt", "None"]),
    ([{"prompt": 3, "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": [], "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": [3], "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": ["area"], "answer": "x"}], "", ["row 0", "prompt", "{role, content}"]),
    ([{"prompt": {"role": "user"}, "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": [{"role": "user"}], "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": [{"role": "user", "content": 3}], "answer": "x"}], "", ["row 0", "prompt"]),
    ([{"prompt": "area", "text": "x"}], "", ["--reward", "'answer'", "text"]),
    (ONE + [{"prompt": "food", "answer": None}], "", ["row 1", "'answer'", "None"]),
    (ONE, "--eval-dataset-name food.jsonl", ["--eval-dataset-name", "row 0", "'answer'"]),
    ([{**ONE[0], "_pseudo_label": "y"}], "", ["--dataset-name", "_pseudo_label"]),
    ([{**ONE[0], "_prompt_ids": [1]}], "", ["--dataset-name", "_prompt_ids"]),
    ("{broken", "", ["--dataset-name", "data.jsonl", "JSON parse error"]),
    (
        '{"prompt": "area"}\n\n{"prompt": "area",}\n',
        "",
        ["--dataset-name", "data.jsonl", "JSON parse error"],
    ),
    ('{"prompt": "area"}\n[1, 2]\n', "", ["--dataset-name", "data.jsonl", "JSON parse error"]),
    ('{"prompt": "area"}\n{"prompt": 3}\n', "", ["--dataset-name"]),
    (
        b'{"prompt": "area", "answer": "x"}\n{"prompt": "\xff\xfe", "answer": "x"}\n',
        "",
        ["--dataset-name", "utf-8"],
    ),
    (b"\x00\x01\x02", "", ["--dataset-name", "data.jsonl", "JSON parse error"]),
    (b"", "", ["--dataset-name", "expected rows, found an empty file"]),
    (None, "", ["--dataset-name", "No such file"]),
    (ONE, "--dataset-name data.csv", ["--dataset-name", "json, jsonl or parquet", "data.csv"]),
    (ONE, "--dataset-name broken.parquet", ["--dataset-name", "broken.parquet"]),
    (ONE, "--dataset-name no/such/set", ["--dataset-name", "no/such/set"]),
    (ONE, "--dataset-name nosuchset", ["--dataset-name", "nosuchset"]),
    (ONE, "--eval-dataset-name nosuch.jsonl", ["--eval-dataset-name", "No such file"]),
    (ONE, "--prompt-column question", ["--dataset-name", "'question'", "--prompt-column"]),
    (ONE, "--eval-dataset-name data.csv", ["--eval-dataset-name", "json, jsonl or parquet"]),
    ([{"prompt": "area"}], "--pseudo-label-noise 0.1", ["--reward", "'answer'"]),
    (
        [{"prompt": "area"}],
        "--reward bad:half --pseudo-label-noise 0.1 --eval-dataset-name food.jsonl",
        ["--pseudo-label-noise", "answer"],
    ),
    (
        ONE * 3,
        "--pseudo-label-noise 0.5 --eval-dataset-name other.jsonl",
        ["--pseudo-label-noise", "different"],
    ),
    (ONE, "--dataset-split nosuch", ["--dataset-name", "nosuch"]),
    (ONE, "--dataset-config nosuch", ["--dataset-name", "a file has no config", "nosuch"]),
    (ONE * 4, "", ["--dataset-name", "held-out"]),
    (
        ONE,
        "--response-length 999",
        ["no row fits", "at most 0 tokens, the context less --response-length"],
    ),
    (ONE, "--reward bad:raises", ["--reward", "KeyError", "bad.py, line 3"]),
    (ONE, "--reward bad:short", ["--reward", "8 numbers", "1 values"]),
    (ONE, "--reward bad:nan", ["--reward", "row 7", "nan"]),
    (ONE, "--reward bad:text", ["--reward", "row 0", "'1'"]),
    (ONE, "--reward bad:none", ["--reward", "row 0", "None"]),
    (ONE, "--reward bad:nothing", ["--reward", "8 numbers", "NoneType"]),
    (ONE, "--reward bad:nested", ["--reward", "row 0", "[1, 2]"]),
    (ONE, "--reward bad:huge", ["--reward", "row 0", "1e+39"]),
    (ONE, "--reward bad:leaves", ["--reward", "SystemExit"]),
    (ONE, "--reward bad:late", ["--reward", "TimeoutError", "the service is slow"]),
    (ONE, "--user bad:leaves", ["--user", "SystemExit"]),
    (ONE, "--reward bad:nosuch", ["--reward", "nosuch"]),
    (ONE, "--user bad:nosuch", ["--user", "nosuch"]),
    (
        ONE,
        "--eval-dataset-name other.jsonl --eval-dataset-split nosuch",
        ["--eval-dataset-name", "nosuch"],
    ),
    ("[1, 2]\n", "", ["--dataset-name", "'prompt'", "2 rows of text"]),
    (ONE, "--reward bad:needs", ["--reward", "needs()", "'answer'"]),
    (ONE, "--reward bad:half --reward-noise-fp 0.1", ["--reward-noise-fp", "0.5"]),
    (ONE, "--user bad:raises", ["--user", "KeyError"]),
    (ONE, "--user bad:three", ["--user", "expected a str", "3"]),
    (ONE, "--reward nosuchmodule:f", ["--reward", "nosuchmodule"]),
    (ONE, "--reward broken:f", ["--reward", "broken"]),
    (ONE, "--reward model:nosuchmodel", ["--reward", "nosuchmodel"]),
]


BAD_CODE = """
def short(prompts, **columns): return [0.0]
def raises(*prompts, **columns): return {}['x']
def half(prompts, **columns): return [0.5] * len(prompts)
def nan(prompts, **columns): return [0.0] * 7 + [float('nan')]
def text(prompts, **columns): return ['1'] * len(prompts)
def none(prompts, **columns): return [None] * len(prompts)
def nothing(prompts, **columns): pass
def nested(prompts, **columns): return [[1, 2]] * len(prompts)
def huge(prompts, **columns): return [1e39] * len(prompts)
def leaves(prompts, **columns): raise SystemExit(0)
def late(prompts, **columns): raise TimeoutError("the service is slow")
def needs(prompts, completions, level): return [level] * len(prompts)
def three(messages, **columns): return 3
"""


@pytest.mark.parametrize("rows,flags,words", BAD_DATA)
def test_bad_data_and_rewards(rows, flags, words, model_folder, tmp_path, capsys, monkeypatch):
    """And what stood in the output folder before is still there, moved or not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "bad", raising=False)
    Path("bad.py").write_text(BAD_CODE)
    Path("broken.py").write_text("def f(:\n")
    for name in ("data.csv", "broken.parquet"):
        Path(name).write_text("prompt,answer\narea,x\n")
    write_rows(Path("other.jsonl"), [{"prompt": "food", "answer": "x"}])
    write_rows(Path("food.jsonl"), [{"prompt": "food"}])
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text("precious\n")
    if isinstance(rows, (str, bytes)):
        Path("data.jsonl").write_bytes(rows.encode() if isinstance(rows, str) else rows)
    elif rows is not None:
        write_rows(Path("data.jsonl"), rows)
    argv = [*own(model_folder, "data.jsonl", "exact"), "--output-dir", "run", *flags.split()]
    refused(capsys, argv, *words)
    kept = [path.read_text() for path in Path("run").rglob("metrics.jsonl")]
    assert "precious\n" in kept


def test_the_table_of_bad_data_is_long_enough():
    assert len(BAD_DATA) >= 55


def test_a_reward_that_fails_leaves_the_earlier_run_where_it_is(model_folder, tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", [{**row, "answer": None} for row in rows_of()])
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    into = ["--output-dir", str(tmp_path)]
    argv = own(model_folder, data, "model:" + model_folder)
    refused(capsys, [*argv, *into], "--reward", "sequence classifier")
    argv = own(model_folder, data, "no_such_module:f")
    refused(capsys, [*argv, *into], "--reward", "no_such_module")
    rows = [{"prompt": row["prompt"], "text": "x"} for row in rows_of()]
    data = write_rows(tmp_path / "data.jsonl", rows)
    refused(capsys, [*own(model_folder, data, "exact"), *into], "--reward", "'answer'")
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"
    assert not (tmp_path / "earlier-1").exists()


def test_an_output_folder_that_cannot_be_made_is_one_line(
    warm_start, tmp_path, capsys, monkeypatch
):
    def denied(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(checkpoints, "set_aside", denied)
    shutil.copytree(warm_start, tmp_path / "warm_start")
    argv = [*SMALL, *f"--eval-samples 4 --output-dir {tmp_path}".split()]
    refused(capsys, argv, "Permission denied", str(tmp_path))


def test_the_risk_terms_are_as_the_flags_say(warm_start, tmp_path):
    flags = "--alpha 0.2 --beta 0.3 --tail-ratio 0.4 --tail-reach 7 --calibration-weight 0.5"
    flags += " --shift-weight 0.6 --shape-weight 0.7 --curvature-weight 0.8 --consistency-weight 1"
    run, _ = run_of(warm_start, tmp_path, *flags.split(), build=build)
    assert run.risk == RiskConfig(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 7.0)
    run, _ = run_of(warm_start, tmp_path)
    assert run.risk == RiskConfig()


def test_a_reward_that_a_task_cannot_have_is_one_line(warm_start, tmp_path):
    with pytest.raises(InputError, match="row 0: expected a number as 'answer'"):
        run_of(warm_start, tmp_path, "--reward", "math")
