"""The README's claims that can be checked: its Python blocks run, its tables are complete."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from prac_fx import PracConfig
from prac_fx.passes.plan_data import REASONS
from prac_fx.report import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


def test_every_option_and_its_default_are_listed() -> None:
    for field in dataclasses.fields(PracConfig):
        default = str(field.default).replace("'", '"')
        shown = f'`"{default}"`' if isinstance(field.default, str) else f"`{default}`"
        assert f"| `prac.{field.name}` | {shown} |" in README


def test_every_reason_is_listed() -> None:
    for code, meaning in REASONS.items():
        if code:
            assert f"| `{code}` | {meaning} |" in README


def test_the_report_shown_is_the_end_of_the_report_printed(capsys) -> None:  # type: ignore[no-untyped-def]
    assert main([str(ROOT / "examples" / "mlp.py"), "--no-alternatives"]) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.strip().splitlines())
    assert printed[printed.index("what the step keeps for backward") :] in README


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_tests_in_the_table_of_what_composes_exist() -> None:
    section = README.partition("## What composes")[2].partition("\n## ")[0]
    sources = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    names = re.findall(r"`(?:(?:passes/)?test_\w+\.py::)?(test_\w+)(\*?)`", section)
    assert len(names) > 20
    for name, star in names:
        pattern = rf"def {name}" + ("" if star else r"\(")
        assert any(re.search(pattern, text) for text in sources.values()), name
    for file in re.findall(r"`((?:passes/)?test_\w+\.py)(?:::|`)", section):
        assert (ROOT / "tests" / file).exists(), file
