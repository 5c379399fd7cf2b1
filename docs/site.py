"""Hook of mkdocs: pages made from the files at the root of the repository, and links to them.

README.md, ARCHITECTURE.md and others are read on GitHub and on the site. Here they become pages,
and links between them and docs/ are rewritten, so that both places have one text and no dead link.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
}
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file of PAGES."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at the pages of the site; a link to a file that has none keeps its text only."""
    name = page.file.src_uri
    at = {made: source for source, made in PAGES.items()}.get(name, f"docs/{name}")
    folder = (ROOT / at).parent

    def rewrite(match: re.Match[str]) -> str:
        target = (folder / match[1]).resolve().relative_to(ROOT.resolve()).as_posix()
        anchor = match[2] or ""
        if target == "README.md":
            return f"](index.md{anchor})"
        if target in PAGES:
            return f"]({PAGES[target]}{anchor})"
        if target.startswith("docs/"):
            return f"]({target.removeprefix('docs/')}{anchor})"
        assert (ROOT / target).exists(), f"{name}: link to {match[1]}, which does not exist"
        return "]"

    text = _LINK.sub(rewrite, markdown)
    # what lost its target is text again: [label] -> label
    return re.sub(r"(?<!!)\[([^\[\]]+)\](?![(\[:])", r"\1", text) if "](" in markdown else text
