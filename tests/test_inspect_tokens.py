"""experiments/inspect_tokens.py: every number by single rows and loops; the page in a browser."""

import functools
import html.parser
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from critic import QuantileCritic
from experiments import inspect_tokens
from harness.checkpoints import newest_checkpoint
from tasks import InputError
from tasks.builtin import task_rows


def length_reward(prompts, completions, answer, **columns):
    return [len(completion[-1]["content"].split()) / 4 for completion in completions]


def hungry(messages, **columns):
    heard = sum(message["content"] == "food thai" for message in messages)
    return "food thai" if heard < 2 else None


FLAGS = """--reward test_inspect_tokens:length_reward --total-episodes 8 --batch-size 8
    --stop-token thai --response-length 6 --num-quantiles 30 --critic-warmup-steps 0
    --eval-samples 8 --learning-rate 1e-2 --critic-learning-rate 1e-2 --gamma 0.9 --lam 0.8
    --kl-coef 0.3 --temperature 1.5 --missing-eos-penalty 0.5 --bootstrap-truncated
    --reward-noise-outlier 1 5"""


def two_runs(folder, model_folder, *more):
    """Runs of one iteration, with DVPO and with PPO, alike in all else; steps of some size."""
    rows = task_rows("dialogue", "train", 16, 0)
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--model-name-or-path", model_folder, "--dataset-name", str(folder / "d.jsonl")]
    for algo in ("dvpo", "ppo"):
        own = ["--algo", algo, "--output-dir", str(folder / algo)]
        assert train.main([*FLAGS.split(), *data, *more, *own]) == 0
    return folder


@pytest.fixture(scope="module")
def pair(model_folder, tmp_path_factory):
    """Two runs, and what is left of them without a state or a critic."""
    folder = two_runs(tmp_path_factory.mktemp("pair"), model_folder)
    for name, gone in (("dvpo", "state.pt"), ("ppo", "critic")):
        without = shutil.ignore_patterns(gone)
        shutil.copytree(folder / name, folder / f"{name}-torn", ignore=without)
    return folder


@pytest.fixture(scope="module")
def talks(model_folder, tmp_path_factory):
    user = ("--user", "test_inspect_tokens:hungry")
    return two_runs(tmp_path_factory.mktemp("talks"), model_folder, *user)


@pytest.fixture
def inspect(monkeypatch):
    """inspect_tokens.py, as a function of its words."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["", *map(str, words)])
        inspect_tokens.main()

    return run


@functools.cache
def loaded(kind, folder):
    options = {} if kind is QuantileCritic else {"dtype": torch.float32}
    return kind.from_pretrained(folder, **options).eval()


def logprobs_of(folder, tokens, own):
    """What a model gives to tokens (1, L) at positions own: floats, at temperature 1.5."""
    model = loaded(AutoModelForCausalLM, folder)
    table = (model(tokens).logits[0].double() / 1.5).log_softmax(-1)
    return [table[at - 1, tokens[0, at]].item() for at in own]


def by_hand(folder, model_folder, row, algo):
    """Sorted quantiles, advantages, rewards and returns of one response, by loops over floats."""
    run, tokenizer = newest_checkpoint(folder / "dvpo"), AutoTokenizer.from_pretrained(model_folder)
    tokens, own = tokenizer(row["prompt"])["input_ids"], []
    for token in row["tokens"]:
        tokens = tokens + tokenizer(token["before"])["input_ids"] + [token["id"]]
        own.append(len(tokens) - 1)
    tokens = torch.tensor([tokens])
    new, old = (logprobs_of(name, tokens, own) for name in (run / "policy", model_folder))
    rewards = [-0.3 * (a - b) for a, b in zip(new, old)]
    rewards[-1] += row["score"] - 0.5 * row["truncated"]
    critic = loaded(QuantileCritic, newest_checkpoint(folder / algo) / "critic")
    positions = torch.arange(tokens.shape[1])[None]
    heads = critic(tokens, torch.ones_like(tokens), positions)[0]
    heads = heads.mean(dim=1).double().sort(dim=-1).values
    quantiles, after = heads[[at - 1 for at in own]], heads[-1].mean().item() * row["truncated"]
    values, advantages, returns = [*quantiles.mean(dim=-1).tolist(), after], [0.0], [0.0]
    for t in reversed(range(len(own))):
        delta = rewards[t] + 0.9 * values[t + 1] - values[t]
        advantages.insert(0, delta + 0.9 * 0.8 * advantages[0])
        returns.insert(0, rewards[t] + 0.9 * returns[0])
    return quantiles, advantages[:-1], rewards, returns[:-1]


def assert_shown_as_by_hand(folder, model_folder, row):
    quantiles, advantages, rewards, returns = by_hand(folder, model_folder, row, "dvpo")
    values, scalar_advantages, *_ = by_hand(folder, model_folder, row, "ppo")
    for t, token in enumerate(row["tokens"]):
        q = quantiles[t]
        shown = [math.ceil(p * 30 - 1e-6) - 1 for p in (0.05, 0.25, 0.5, 0.75, 0.95)]
        expected = {
            "shown": q[shown].tolist(),
            "quantiles": q.tolist(),
            "mean": q.mean().item(),
            "std": q.std(unbiased=False).item(),
            "scalar": values[t].item(),
            "advantage": advantages[t],
            "scalar_advantage": scalar_advantages[t],
            "reward": rewards[t],
            "return": returns[t],
        }
        for name, value in expected.items():
            assert token[name] == pytest.approx(value, abs=2e-5), name


@pytest.mark.parametrize("runs", ["pair", "talks"])
def test_what_is_shown_of_a_token_is_what_single_rows_give_by_hand(
    runs, request, model_folder, monkeypatch, inspect
):
    folder, rows = request.getfixturevalue(runs), []
    monkeypatch.setattr(inspect_tokens, "table", rows.append)
    inspect(folder / "dvpo", "--scalar", folder / "ppo", "--rows", 8)
    assert len(rows) == 8 and {row["truncated"] for row in rows} == {True, False}
    assert len({len(row["tokens"]) for row in rows}) > 1
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    said = [token["before"] for row in rows for token in row["tokens"] if token["before"]]
    assert set(said) == ({"<user> food thai <assistant>"} if runs == "talks" else set())
    for row in rows:
        row["score"] += 0.5 * row["truncated"]  # what the reward gave
        last = max([0, *(t for t, token in enumerate(row["tokens"]) if token["before"])])
        ids = [token["id"] for token in row["tokens"][last:]]
        words = tokenizer.decode(ids, skip_special_tokens=True).split()
        assert row["score"] == pytest.approx(len(words) / 4)
        for token in row["tokens"]:
            assert token["text"] == tokenizer.decode([token["id"]])
        assert_shown_as_by_hand(folder, model_folder, row)


def test_a_scalar_critic_is_fitted_where_none_is_given(pair, inspect, capsys):
    inspect(pair / "dvpo", "--samples", 11, "--rows", 1)
    said = capsys.readouterr()
    assert "fitted here, as --algo ppo does it, on 10 responses" in said.out
    assert "2/2" in said.err and "token " in said.out and "\x1b[" not in said.out


@pytest.mark.parametrize(
    "flags,found",
    [
        ("{}/ppo --scalar {}/ppo", "expected a run with --algo dvpo, found ppo"),
        ("{}/none --scalar {}/ppo", "expected a checkpoint in '{}/none', found none"),
        ("{}/dvpo --scalar {}/dvpo", "expected a run with --algo ppo, found dvpo"),
        ("{}/dvpo --samples 0", "--samples: expected a whole number in [1, inf)"),
        ("{}/dvpo --scalar {}/ppo --rows 0", "--rows: expected a whole number in [1, inf)"),
        ("{}/dvpo --scalar {}/ppo --html {}/none/x.html", "No such file or directory: '{}/none/x"),
        ("{}/dvpo-torn --scalar {}/ppo", "run: {}/dvpo-torn: "),
        ("{}/dvpo --scalar {}/ppo-torn", "--scalar: {}/ppo-torn: "),
    ],
)
def test_what_cannot_be_inspected_is_one_line(pair, inspect, capsys, monkeypatch, flags, found):
    monkeypatch.setattr(inspect_tokens, "look", lambda *rest: pytest.fail("it went to work"))
    with pytest.raises(SystemExit) as stopped:
        inspect(*flags.format(*[pair] * 3).split())
    assert stopped.value.code == 2
    assert found.format(pair) in capsys.readouterr().err.splitlines()[-1]


def test_a_conversations_other_turns_stand_between_the_tokens(talks, inspect, tmp_path, capsys):
    page = tmp_path / "page.html"
    inspect(talks / "dvpo", "--scalar", talks / "ppo", "--rows", 8, "--html", page)
    said, turn = capsys.readouterr().out, "<user> food thai <assistant>"
    assert f"\n({turn})\n" in said and "\x1b[" not in said
    span = f'<span class="user">{html.escape(turn)}</span><button'
    assert page.read_text().count(span) == said.count("\n(<user> food") > 0


@pytest.mark.parametrize(
    "changed,flag,algo,found",
    [
        ({"whiten_rewards": True}, "run", "dvpo", "--whiten-rewards"),
        ({"seed": 1}, "--scalar", "ppo", "expected --seed 0, as in the other run, found 1"),
        ({"user": "x:y"}, "--scalar", "ppo", "--user None, as in the other run, found x:y"),
        ({"user": "x:y", "max_turns": 7}, "--scalar", "ppo", "--user"),
        ({"max_turns": 7}, "--scalar", "ppo", "expected --max-turns 6"),
    ],
)
def test_runs_of_another_seed_or_unit_are_refused(pair, tmp_path, changed, flag, algo, found):
    shutil.copytree(pair / algo, tmp_path / algo)
    saved = json.loads((pair / algo / "args.json").read_text())
    saved["flags"] |= changed
    (tmp_path / algo / "args.json").write_text(json.dumps(saved))
    ours = inspect_tokens.flags_of(pair / "dvpo", "run", "dvpo")
    with pytest.raises(InputError, match=found):
        if flag == "run":
            inspect_tokens.flags_of(tmp_path / algo, flag, algo)
        else:
            inspect_tokens.scalar_critic(tmp_path / algo, ours)


HOSTILE = [
    "</script><script>document.title = 1</script>",
    "<!--NUMBERS-->",
    '" onmouseover="x',
    "&lt;\n",
    "\x1b[31m\u202e",
]


def hostile_page():
    """A page of five tokens whose numbers are 0.1, 0.2, ... and their tenths."""
    turn, tokens = {2: "long " * 60 + "x" * 300}, []
    for i, text in enumerate(HOSTILE):
        quantiles = [i / 10 + j / 100 for j in range(10)]
        token = {"text": inspect_tokens.visible(text), "before": turn.get(i, ""), "id": i}
        token |= {"quantiles": quantiles, "shown": [quantiles[j] for j in (0, 2, 4, 7, 9)]}
        token |= {"std": 0.03, "mean": i / 10 + 0.045, "advantage": 0.2 - i / 10}
        token |= {"scalar": i / 7, "scalar_advantage": -0.1, "reward": 0.0, "return": 0.5}
        tokens.append(token)
    row = {"prompt": HOSTILE[0], "score": 1.0, "truncated": False, "tokens": tokens}
    return inspect_tokens.page([row], "<b>said</b>")


class Reader(html.parser.HTMLParser):
    """Tags, which must be closed in order, and texts."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.texts = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_models_say():
    page, reader = hostile_page(), Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open and [tag for tag, _ in reader.seen].count("script") == 2
    assert not any("onmouseover" in attributes for _, attributes in reader.seen)
    foreign = ("http://", "https://", "src=", "@import", "url(", "\x1b", "\u202e")
    assert all(word not in page for word in foreign)
    visible = [*HOSTILE[:3], "&lt;↵", "·[31m·"]
    assert all(reader.texts.count(text) >= 2 for text in visible)
    assert "<b>said</b>" in reader.texts


def find_browser(playwright):
    """Chromium's file: in the variable CHROMIUM, on the PATH, or Playwright's own; or a skip."""
    names = ("chromium", "chromium-browser", "google-chrome")
    on_path = [found for found in map(shutil.which, names) if found]
    own = playwright.chromium.executable_path
    found = os.environ.get("CHROMIUM") or [*on_path, own][0]
    if not Path(found).is_file():
        where = "in the variable CHROMIUM, on the PATH, or by `playwright install chromium`"
        pytest.skip(f"no browser: expected Chromium {where}")
    return found


def assert_colours_follow_the_scheme(page, folder):
    for scheme, is_dark in (("light", False), ("dark", True)):
        page.emulate_media(color_scheme=scheme)
        style = "getComputedStyle(document.body)"
        colours = page.evaluate(f"[{style}.color, {style}.backgroundColor]")
        text, ground = (sum(map(int, re.findall("[0-9]+", colour)[:3])) for colour in colours)
        assert (text > ground + 300) == is_dark and (ground > text + 300) != is_dark
        page.screenshot(path=folder / f"{scheme}.png")
        assert (folder / f"{scheme}.png").read_bytes()[:4] == b"\x89PNG"


def assert_tokens_show_their_distributions(page):
    token, detail = page.locator(".token"), page.locator(".detail")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator(".user").count() == 1 and token.count() == 5
    assert "95 %: 0.090" in detail.inner_text()  # the first: the largest advantage
    token.nth(3).hover()
    said = detail.text_content()
    texts = ["before “&lt;↵”", "5 %: 0.300", "50 %: 0.340", "95 %: 0.390"]
    texts += ["scalar critic's value0.429", "advantage-0.100"]
    assert all(text in said for text in texts)
    circles = detail.locator("circle").all()
    marks = [float(circle.get_attribute("cx")) for circle in circles]
    assert len(marks) == len(set(marks)) == 5 and marks == sorted(marks)
    assert detail.locator("path.curve").count() == 1
    token.nth(1).focus()
    assert "before “<!--NUMBERS-->”" in detail.text_content()
    page.keyboard.press("ArrowLeft")
    assert "before “</script><script>" in detail.text_content()
    assert page.locator(".token.on").count() == 1
    token.nth(4).click()
    assert "5 %: 0.400" in detail.text_content()
    assert page.title() == "Which tokens carry the advantage"


def test_pointing_at_a_token_in_a_browser_shows_its_distribution(tmp_path):
    """And so do the keyboard and a click; no script of a token runs, no network is asked."""
    why = "playwright is not installed, see requirements-browser.txt"
    sync_api = pytest.importorskip("playwright.sync_api", reason=why)
    (tmp_path / "page.html").write_text(hostile_page(), encoding="utf-8")
    wrong, asked, address = [], [], (tmp_path / "page.html").as_uri()
    with sync_api.sync_playwright() as playwright:
        path, flags = find_browser(playwright), ["--no-sandbox"]  # containers run as root
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        page = browser.new_page(viewport={"width": 1000, "height": 700})
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        assert_tokens_show_their_distributions(page)
        assert_colours_follow_the_scheme(page, tmp_path)
        browser.close()
    assert not wrong and asked == [address]
