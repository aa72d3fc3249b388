"""Hooks of MkDocs: a site of the same files that are read in the repository.

The README is the first page. A link that leads out of docs/ brings what it leads to into the site:
a page or a picture as it is, any other file as a page with its text. A link to a folder becomes
plain text. A link to nothing stays as it is, and `mkdocs build --strict` fails.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_AS_THEY_ARE = (".md", ".png", ".svg", ".json")
_FIRST = {"README.md": "index.md"}
_PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages at the root of the repository, and all that pages link to outside of docs/."""
    todo = [*_PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    seen = set(todo)
    while todo:
        source = todo.pop()
        if not source.startswith("docs/"):
            files.append(_file(source, config))
        if source.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            found = {_target(source, match[3])[0] for match in _LINK.finditer(text)}
            new = {one for one in found - seen if one and (ROOT / one).is_file()}
            todo += sorted(new)
            seen |= new
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    source = _source(page.file)
    parts = _FENCE.split(markdown)  # every second one is a block of code
    parts[::2] = [
        _LINK.sub(lambda match: _rewritten(match, source, page), part) for part in parts[::2]
    ]
    return "".join(parts)


def _rewritten(match: re.Match[str], source: str, page: Page) -> str:
    mark, text, link = match.groups()
    target, anchor = _target(source, link)
    if not target:
        return match[0]
    if (ROOT / target).is_dir():
        return text
    here = posixpath.dirname(page.file.src_uri)
    return f"{mark}[{text}]({posixpath.relpath(_site_path(target), here or '.')}{anchor})"


def _target(source: str, link: str) -> tuple[str, str]:
    """The file that a link leads to, from the root of the repository, and the anchor in it."""
    path, hash_, anchor = link.partition("#")
    if not path or ":" in path:
        return "", ""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path)), hash_ + anchor


def _site_path(source: str) -> str:
    """Where a file of the repository is in the site."""
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    path = _FIRST.get(source, source)
    return path if path.endswith(_AS_THEY_ARE) else f"{path}.md"


def _source(file: File) -> str:
    """Where a file of the site is in the repository."""
    return getattr(file, "repository_path", f"docs/{file.src_uri}")


def _file(source: str, config: MkDocsConfig) -> File:
    path = ROOT / source
    level = InclusionLevel.INCLUDED
    if path.suffix in _AS_THEY_ARE:
        file = File.generated(config, _site_path(source), abs_src_path=str(path), inclusion=level)
    else:
        text = path.read_text(encoding="utf-8")
        language = {".py": "python", ".sh": "sh"}.get(path.suffix, "text")
        header = f"---\nsearch:\n  exclude: true\n---\n\n# {source}\n\n"
        content = f"{header}~~~~{language}\n{text}\n~~~~\n"
        file = File.generated(config, _site_path(source), content=content, inclusion=level)
    file.repository_path = source  # type: ignore[attr-defined]
    return file
