"""Fills the generated parts of the pages beside this file: `python docs/generate.py`.

A generated part stands between the lines `<!-- generated: NAME -->` and `<!-- end -->`. The pages
are committed, so that they read the same on GitHub as on the site. `tests/test_readme.py` fails
when one is not up to date.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path

from prac_fx.config import PARTS, POLICIES, SKIPPABLE_PASSES, PracConfig
from prac_fx.option_checks import PREFIX
from prac_fx.passes.plan_data import REASONS

FOLDER = Path(__file__).parent
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Defaults that are no value: what happens while the option is not set.
_UNSET = {
    "rules": "no rules",
    "tail_every": "at each refresh",
    "include": "all modules",
    "exclude": "no module",
    "skip_passes": "no pass",
    "report": "not written",
}
# Values that the types do not say.
_VALUES = {**PARTS, "skip_passes": SKIPPABLE_PASSES}


def option_texts() -> dict[str, str]:
    """What the docstring of `PracConfig` says of each option, in one line each."""
    section = inspect.getdoc(PracConfig) or ""
    section = section.partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}


def options() -> str:
    """A table of all options with the defaults that count, then each one in full."""
    texts = option_texts()
    rows = [
        (f"[`{PREFIX}{name}`](#prac{name})", _default(name), _cell(_first_sentence(text)))
        for name, text in texts.items()
    ]
    table = _table(("option", "default", "effect"), rows)
    return "\n".join([table, *(_in_full(name, text) for name, text in texts.items())])


def policies() -> str:
    """What each policy sets."""
    names = list(dict.fromkeys(name for policy in POLICIES.values() for name in policy))
    configs = {policy: PracConfig(policy=policy) for policy in POLICIES}  # type: ignore[arg-type]
    rows = [
        (f"`{PREFIX}{name}`", *(_shown(getattr(config, name)) for config in configs.values()))
        for name in names
    ]
    return _table(("option", *(f"`{policy}`" for policy in POLICIES)), rows)


def reasons() -> str:
    """A table of all reason codes."""
    rows = [(f"`{code}`", _cell(meaning)) for code, meaning in REASONS.items() if code]
    return _table(("reason", "meaning"), rows)


PARTS_OF_PAGES: Mapping[str, Callable[[], str]] = {
    "options": options,
    "policies": policies,
    "reasons": reasons,
}


def filled(page: str) -> str:
    """The text of a page, with its generated parts as the code has them now."""
    return _PART.sub(lambda m: f"{m[1]}\n{PARTS_OF_PAGES[m[2]]()}\n{m[3]}", page)


def _in_full(name: str, text: str) -> str:
    values = _VALUES.get(name) or _literals(name)
    listed = f"Values: {', '.join(f'`{value!r}`' for value in values)}." if values else ""
    default = f"Default: {_default(name)}."
    lines = [f"### `{PREFIX}{name}`", text, f"{default} {listed}".strip().replace("'", '"')]
    return "\n" + "\n\n".join(lines) + "\n"


def _default(name: str) -> str:
    value = getattr(PracConfig(), name)
    return _UNSET[name] if value is None or value == () else _shown(value)


def _shown(value: object) -> str:
    if isinstance(value, tuple):  # one per role
        return " / ".join(_shown(one) for _, one in value)
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def _literals(name: str) -> tuple[str, ...]:
    hint = typing.get_type_hints(PracConfig)[name]
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.) (?=[A-Z\"0-9`])", text)[0]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [headers, ("---",) * len(headers), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Rewrite the pages whose generated parts have changed."""
    for path in sorted(FOLDER.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        if filled(page) != page:
            path.write_text(filled(page), encoding="utf-8")
            print(f"{path.name}: generated anew")


if __name__ == "__main__":
    main()
