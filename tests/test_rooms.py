"""The layout of the package: lower rooms know nothing of higher ones, and every room is installed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import prac_fx

ROOT = Path(__file__).parent.parent
INTEGRATIONS = ROOT / "prac_fx" / "integrations"


def test_lower_rooms_know_nothing_of_higher_ones() -> None:
    """The contracts are in pyproject.toml."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    checked = subprocess.run(
        [*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_every_folder_is_installed() -> None:
    listed = set(re.findall(r'^    "(prac_fx[\w.]*)",$', _pyproject("packages"), re.MULTILINE))
    folders = {path.parent for path in (ROOT / "prac_fx").rglob("__init__.py")}
    folders.add(ROOT / "prac_fx" / "passes")  # a link, which rglob does not follow
    assert listed == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_every_public_name_is_imported_from_where_types_say() -> None:
    tree = ast.parse(Path(prac_fx.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {name.name: node.module for node in imports for name in node.names}
    assert homes == {name: f"prac_fx.{home}" for name, home in prac_fx._HOME_OF.items()}
    assert {*homes, "__version__"} == set(prac_fx.__all__)
    assert all(hasattr(prac_fx, name) for name in prac_fx.__all__)


def test_every_room_is_in_the_contract() -> None:
    layers = set(re.findall(r"prac_fx\.(\w+)", _pyproject("layers")))
    rooms = {
        path.stem for path in (ROOT / "prac_fx").iterdir() if path.is_dir() or path.suffix == ".py"
    }
    assert layers == rooms - {"__init__", "_version", "__pycache__"}


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    requirement = re.compile(r'"([\w-]+)[^"]*"')
    declared = set(requirement.findall(_pyproject("dependencies")))
    # one optional part draws pictures
    optional = re.findall(r"^plot = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    declared |= set(requirement.findall(optional[0]))
    files = [path for folder in ("prac_fx", "passes") for path in (ROOT / folder).rglob("*.py")]
    found = _imported(*(path for path in files if path.parent != INTEGRATIONS))
    assert found == declared


def test_an_integration_imports_its_host_alone() -> None:
    """Nobody needs to have the others. What a host brings along is there with it."""
    brought = {"transformers": {"accelerate"}, "axolotl": {"pydantic"}}
    for path in INTEGRATIONS.glob("*.py"):
        found = _imported(path) - {"torch"}
        assert found <= {path.stem} | brought.get(path.stem, set()), path.name


def _imported(*paths: Path) -> set[str]:
    """Packages of others that files import; each is called like its distribution."""
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"prac_fx"}


def _pyproject(key: str) -> str:
    """The lines of a list in it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return text.split(f"{key} = [\n", 1)[1].split("]", 1)[0]
