"""README, docs/ and CONTRIBUTING are true: code runs, tables are complete, links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import prac_fx
from prac_fx import PracConfig
from prac_fx.passes.plan_data import REASONS
from prac_fx.report import main
from prac_fx.report.arguments import parse_arguments
from tests.uncompiled import no_code_generation

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
# every page that a reader is sent to, by its path
PAGES = {
    **{
        name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")
    },
    **{f"docs/{name}": text for name, text in DOCS.items()},
}
ALL = "\n".join(PAGES.values())


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def _run(page: str, text: str) -> dict[str, Any]:
    """Run its Python blocks one after the other, as a reader would."""
    namespace: dict[str, Any] = {}
    for block in _blocks(text, "python"):
        exec(compile(block, page, "exec"), namespace)
    return namespace


# -- code ------------------------------------------------------------------------------------------


def test_python_blocks_of_the_readme_run() -> None:
    assert len(_blocks(README, "python")) == 2
    _run("README.md", README)


@pytest.mark.parametrize("page", [name for name, text in DOCS.items() if "```python\n" in text])
def test_python_blocks_of_the_docs_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    with no_code_generation():
        _run(page, DOCS[page])


def test_commands_that_are_shown_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files and modules exist, and the report takes their flags."""
    commands = [line for text in PAGES.values() for line in _commands(text)]
    assert len(commands) > 10
    for command in commands:
        module, *arguments = command.split()
        assert importlib.util.find_spec(module), command
        for example in re.findall(r"examples/\w+\.py", command):
            assert (ROOT / example).exists(), command
        if module == "prac_fx.report":
            monkeypatch.chdir(tmp_path)
            parse_arguments(arguments)


def _commands(text: str) -> list[str]:
    """What follows `python -m` in blocks and in single lines of code, without comments."""
    lines = "\n".join(_blocks(text, "sh")).splitlines()
    lines += [code.replace("\n", " ") for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    lines += re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    lines = [line.partition("#")[0].strip() for line in lines]
    return [line.removeprefix("python -m ") for line in lines if line.startswith("python -m ")]


def test_the_report_shown_is_the_end_of_the_report_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(ROOT / "examples" / "mlp.py"), "--no-alternatives"]) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.strip().splitlines())
    assert printed[printed.index("what the step keeps for backward") :] in README
    (excerpt,) = re.findall(r"```\n(    value .*?)```", DOCS["report.md"], re.DOTALL)
    assert excerpt in printed


# -- tables ----------------------------------------------------------------------------------------


def test_generated_parts_are_up_to_date() -> None:
    """If this fails: `python docs/generate.py`."""
    filled = runpy.run_path(str(ROOT / "docs" / "generate.py"))["filled"]
    for name, text in DOCS.items():
        assert filled(text) == text, name
    assert sum(text.count("<!-- generated: ") for text in DOCS.values()) == 3


def test_every_option_is_listed_with_the_default_that_counts() -> None:
    config = PracConfig()
    for field in dataclasses.fields(PracConfig):
        row = rf"^\| \[`prac\.{field.name}`\]\(#prac{field.name}\) \| (.+?) \| (.+) \|$"
        found = re.search(row, DOCS["options.md"], re.MULTILINE)
        assert found, field.name
        shown, effect = found.groups()
        assert len(effect) > 15
        assert "None" not in shown
        value = getattr(config, field.name)
        if value is not None and value != ():
            assert ast.literal_eval(shown.strip("`")) == value
        assert f"### `prac.{field.name}`\n" in DOCS["options.md"]


def test_options_that_pages_name_exist() -> None:
    fields = {field.name for field in dataclasses.fields(PracConfig)}
    for page, text in PAGES.items():
        assert set(re.findall(r"`\"?prac\.([a-z_]+)", text)) <= fields, page


def test_every_reason_is_listed() -> None:
    for code, meaning in REASONS.items():
        if code:
            assert f"| `{code}` | {meaning} |" in DOCS["reasons.md"]


def test_reasons_that_pages_advise_on_exist() -> None:
    advice = DOCS["reasons.md"].partition("## What you can do")[2]
    codes = re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", advice, re.MULTILINE)))
    assert len(codes) > 8
    assert set(codes) <= set(REASONS)


def test_every_public_name_is_in_the_reference() -> None:
    named = re.findall(r"^::: prac_fx\.(\w+)$", DOCS["api.md"], re.MULTILINE)
    assert sorted(named) == sorted(set(prac_fx.__all__) - {"__version__"})


def test_tests_in_the_table_of_what_composes_exist() -> None:
    section = DOCS["compatibility.md"]
    sources = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    names = re.findall(r"`(?:(?:passes/)?test_\w+\.py::)?(test_\w+)(\*?)`", section)
    assert len(names) > 20
    for name, star in names:
        pattern = rf"def {name}" + ("" if star else r"\(")
        assert any(re.search(pattern, text) for text in sources.values()), name
    for file in re.findall(r"`((?:passes/)?test_\w+\.py)(?:::|`)", section):
        assert (ROOT / "tests" / file).exists(), file


# -- links and sizes -------------------------------------------------------------------------------


def _anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```$", "", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", "SECURITY.md"])
def test_links_lead_to_files_and_headings(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^):]+))?\)", text):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in _anchors(file.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_the_site_builds(tmp_path: Path) -> None:
    """As `make docs` does: a warning, such as of a link to nothing, is an error."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    reference = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert 'id="prac_fx.verify"' in reference
    assert (tmp_path / "benchmarks" / "results" / "memory_time.html").exists()


def test_every_page_can_be_found() -> None:
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name in DOCS:
        assert f"docs/{name}" in README, name
        assert re.search(rf"^ +- {name}$", site, re.MULTILINE), name


def test_the_readme_is_one_short_read() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    for line in lines:
        assert len(line) <= 100 or line.startswith("|") or "](" in line, line


def test_the_readme_names_the_two_commands_of_a_fresh_machine() -> None:
    assert "`make demo`" in README
    assert "`make test`" in README
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in set(re.findall(r"`make (\w+)`", ALL)):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command


def test_limits_of_the_readme_are_nine() -> None:
    section = README.partition("## Limits that matter")[2].partition("\n## ")[0]
    assert re.findall(r"^(\d+)\. ", section, re.MULTILINE) == [str(n) for n in range(1, 10)]


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {prac_fx.__version__}\n" in citation
    for text in ("Yanyi", "Yimu", "Cong", "2602.23111"):
        assert text in citation
        assert text in README
