"""The words: README.md, docs/ and experiments/*.md name what exists, and the README stays short."""

import ast
import re
from pathlib import Path

import pytest

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


def test_the_copied_losses_run_alone():
    section = README.split("## Copying a piece")[1].split("\n## ")[0]
    rows = re.findall(r"^(\w+)\.py \| (.*) \| (.*)$", section, re.M)
    example = re.search("```python\n(.*?)```", section, re.S)[1]
    source, namespace = "", {}
    for module, names, imports in rows:
        found = definitions(ROOT / f"{module}.py")
        parts = [ast.unparse(found[name]) for name in re.findall(r"`(\w+)`", names)]
        source += "\n".join([*re.findall("`([^`]*)`", imports), *parts, ""])
    exec(source + example, namespace)
    assert {module for module, *_ in rows} == {"critic", "dvpo"}
    assert namespace["loss"].dim() == 0 and set(namespace["metrics"]) >= {"clipfrac", "ratio"}
