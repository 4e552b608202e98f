"""Hooks of the documentation's site (mkdocs.yml): navigation, files outside of docs, and a check of what was built.

Pages are written to be read in the repository, where links lead to other files. On the site, files outside of docs lie in
``project/``, and a link to a directory leads to a list of its files.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc|obj):<code>~?([^<]+)</code>")
_LOADED = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*\s(?:src|href)=[\"']?(?:https?:)?//")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the navigation from docs/README.md and the pages of that name in its folders."""
    sections = re.findall(
        r"^## (.+?)\n(.*?)(?=^## |\Z)", (_ROOT / "docs" / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    config["nav"] = [{"Documentation": "README.md"}, *({title: _entries("docs", text)} for title, text in sections)]
    return config


def _entries(folder: str, text: str) -> list[dict[str, Any]]:
    """Return the pages that the text lists, each line with a link at its start; the index of a folder becomes a section."""
    entries: list[dict[str, Any]] = []
    for title, target in re.findall(r"^(?:- |\| )\[(.+?)\]\(([\w./-]+\.md)\)", text, re.MULTILINE):
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.endswith("/README.md"):
            inner = _entries(posixpath.dirname(path), (_ROOT / path).read_text())
            entries.append({title: [{title: _on_site(path)}, *inner]})
        else:
            entries.append({title.removesuffix(".md"): _on_site(path)})
    return entries


def _on_site(path: str) -> str:
    """Return the place on the site of a file of the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"project/{path}"


def _in_repository(uri: str) -> str:
    return uri.removeprefix("project/") if uri.startswith("project/") else f"docs/{uri}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of docs to which pages link, and their pages' links, and so on."""
    pending = [_in_repository(file.src_uri) for file in files if file.is_documentation_page()]
    while pending:
        page = pending.pop()
        for target in _targets(page, _text(page)):
            uri = _on_site(target)
            if files.get_file_from_path(uri) is not None or not (_ROOT / target.removesuffix("/README.md")).exists():
                continue
            files.append(File.generated(config, uri, content=_text(target)))
            pending += [target] if target.endswith(".md") else []
    return files


def _targets(page: str, text: str) -> list[str]:
    return [_target(page, link) for _, link, _, _ in _LINK.findall(text)]


def _target(page: str, link: str) -> str:
    """Return the file of the repository to which a page links: of a directory, its README.md, which may have to be made."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return f"{path}/README.md" if (_ROOT / path).is_dir() else path


def _text(path: str) -> str:
    """Return the text of a file, or the list of a directory's files."""
    file = _ROOT / path
    if file.exists():
        return file.read_text()
    folder = file.parent
    names = sorted(each.name for each in folder.iterdir() if each.is_file())
    return "\n".join([f"# {folder.name}", "", *(f"- [{name}]({name})" for name in names), ""])


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Let links lead to where files are on the site."""
    here = _in_repository(page.file.src_uri)

    def moved(found: re.Match[str]) -> str:
        start, link, anchor, end = found.groups()
        uri = posixpath.relpath(_on_site(_target(here, link)), posixpath.dirname(page.file.src_uri) or ".")
        return f"{start}{uri}{anchor or ''}{end}"

    return _LINK.sub(moved, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Turn Sphinx's roles of docstrings into names that link where the reference has them."""
    return _ROLE.sub(_named, html)


def _named(found: re.Match[str]) -> str:
    name = found[1]
    return f'<autoref optional identifier="{name}"><code>{name.rpartition(".")[2]}</code></autoref>'


def on_post_build(config: MkDocsConfig) -> None:
    """Check that no page loads anything from another host, and that the reference has every public name."""
    import prefault

    built = {path: path.read_text() for path in Path(config.site_dir).rglob("*.html")}
    loading = [str(path) for path, html in built.items() if _LOADED.search(html)]
    if loading:
        raise PluginError(f"pages load something from another host: {', '.join(loading)}")
    reference = "".join(html for path, html in built.items() if "reference" in path.parts)
    missing = [name for name in prefault.__all__ if f'id="prefault.{name}"' not in reference]
    if missing:
        raise PluginError(f"docs/reference lacks {', '.join(missing)}")
