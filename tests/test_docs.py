"""The words: README.md, docs/ and experiments/*.md name what exists, and the README stays short."""

import ast
import re
import runpy
from pathlib import Path

import pytest
import torch

from harness.flags import FLAGS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [path for folder in (".", "docs", "experiments") for path in (ROOT / folder).glob("*.md")]
every_page = pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: page.stem)
FLAG_NAMES = {name for flags in FLAGS.values() for name, *_ in flags}


def definitions(path):
    """{name: node} of what a file of code defines at its top."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
    return found


def anchors(text):
    """The headings of a page, as GitHub links to them."""
    headings = re.findall("^#+ (.*)$", re.sub("```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_runs_early():
    words = README.split()
    assert len(words) <= 1800
    assert words.index("pip") < 120
    assert "pip install -r requirements.txt && python train.py" in README


@every_page
def test_links_lead_somewhere_and_prose_is_100_columns_wide(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
    wide = [line for line in text.splitlines() if len(line) > 100 and " | " not in line]
    assert not [line for line in wide if not line.startswith("![")]


@every_page
def test_flags_and_scripts_exist(page):
    text = page.read_text()
    scripts = "".join(path.read_text() for path in ROOT.glob("experiments/*.py"))
    known = FLAG_NAMES | set(re.findall(r'"--([a-z][\w-]*)"', scripts)) | {"help"}
    if page.stem == "noise":
        # No longer in the code: the page says at which commit it is.
        known.add("score-floor")
    if page.stem == "many-gpus":
        # torchrun's.
        known |= {"nnodes", "nproc-per-node", "rdzv-backend", "rdzv-endpoint"}
    assert not set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", text)) - known
    for script in re.findall(r"python (experiments/\w+\.py|train\.py)", text):
        assert (ROOT / script).exists(), script


def test_every_flag_is_in_the_table_with_its_default():
    rows = re.findall(r"^(`--.*) \| (.*) \| ?.*$", (ROOT / "docs" / "flags.md").read_text(), re.M)
    named = {name: default for cell, default in rows for name in re.findall(r"--([\w-]+)", cell)}
    assert set(named) == FLAG_NAMES
    for name, default, allowed, _ in (row for flags in FLAGS.values() for row in flags):
        alone = any(cell == f"`--{name}`" for cell, _ in rows)
        if alone and isinstance(allowed, str) and not isinstance(default, list):
            usual = default if isinstance(default, tuple) else (default,)
            assert tuple(map(float, named[name].split(", "))) == usual, name


def test_every_metric_is_explained():
    text = (ROOT / "docs" / "metrics.md").read_text()
    sources = (ROOT / "train.py").read_text() + (ROOT / "harness" / "reports.py").read_text()
    for name in re.findall('"([a-z]{3,}/[a-z_]{2,})"', sources):
        assert f"`{name}`" in text


@every_page
def test_names_stand_in_the_files_that_the_page_says(page):
    pattern = r"((?:`\w+`,\s)*`\w+`)\s(?:in|\()\s?`?([\w/]+\.py)"
    text = page.read_text()
    rows = re.findall(r"^\[(\w+\.py)\].* \| (.*) \|", text, re.M)
    for names, file in re.findall(pattern, text) + [row[::-1] for row in rows]:
        assert set(re.findall(r"`(\w+)`", names)) <= definitions(ROOT / file).keys(), (names, file)


def test_the_copied_losses_run_alone(tmp_path):
    """Each in a clean file of its own, with nothing but what its row names."""
    page = (ROOT / "docs" / "your-own.md").read_text()
    section = page.split("## Copying a piece")[1].split("\n## ")[0]
    rows = re.findall(r"^(\w+)\.py \| (.*) \| (.*)$", section, re.M)
    examples = re.search("```python\n(.*?)```", section, re.S)[1].split("\n\n")
    made = {}
    for (module, names, imports), example in zip(rows, examples, strict=True):
        found = definitions(ROOT / f"{module}.py")
        parts = [ast.unparse(found[name]) for name in re.findall(r"`(\w+)`", names)]
        file = tmp_path / f"copied_{module}.py"
        file.write_text("\n".join([*re.findall("`([^`]*)`", imports), *parts, example]))
        made[module] = runpy.run_path(str(file))
    assert made["critic"]["loss"].shape == (512,) and made["critic"]["loss"].isfinite().all()
    assert made["dvpo"]["loss"].dim() == 0 and set(made["dvpo"]["metrics"]) >= {"clipfrac", "ratio"}
    # A ratio beyond what fp32 holds: the limit came along.
    old, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    loss, _ = made["dvpo"]["clipped_policy_loss"](old + 1000, old, -torch.ones(1, 1), mask, 0.2)
    assert loss.isfinite() and loss > 1e6


def test_the_example_reward_is_answered_best_by_an_answer():
    code = re.search("```python\n(# rewards.py.*?)```", README, re.S)[1]
    exec(code, namespace := {})
    reward = namespace[re.search(r"--reward rewards:(\w+)", README)[1]]
    texts = ["", "a word or two", "one two three four five six seven eight nine ten", "on " * 19]
    silence, short, best, long = reward(prompts=["p"] * 4, completions=texts)
    assert best == 0 > short > silence and best > long > silence
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": texts[2]}]
    assert reward(prompts=["p"], completions=[turns]) == [0]


GUIDES = [page for page in PAGES if page.parent.name != "experiments"]


@pytest.mark.parametrize("page", sorted(GUIDES), ids=lambda page: page.stem)
def test_commands_have_a_budget_and_say_how_long_they_take(page):
    """In their own paragraph or a neighbouring one.

    Of train.py: --total-episodes, or the default run, which the README times; or it is resumed.
    """
    paragraphs = re.sub(r" *\\\n *", " ", page.read_text()).split("\n\n")
    for number, text in enumerate(paragraphs):
        commands = re.findall(r"python (?:train\.py|experiments/\w+\.py|-m pytest)[^`\n#;]*", text)
        commands = [line.strip() for line in commands if "--help" not in line and "..." not in line]
        for line in commands:
            free = not line.startswith("python train.py") or line == "python train.py"
            bounded = re.search("--total-episodes|--resume", line)
            assert free or bounded, line
        around = " ".join(paragraphs[max(number - 1, 0) : number + 2])
        assert not commands or re.search(r"\b(hours?|minutes?|seconds?)\b", around), commands
