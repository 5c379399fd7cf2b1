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
_LINK = re.compile(r"\[([^\[\]]*)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


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
        label, path, anchor = match[1], match[2], match[3] or ""
        target = (folder / path).resolve().relative_to(ROOT.resolve()).as_posix()
        if target == "README.md":
            return f"[{label}](index.md{anchor})"
        if target in PAGES:
            return f"[{label}]({PAGES[target]}{anchor})"
        if target.startswith("docs/"):
            return f"[{label}]({target.removeprefix('docs/')}{anchor})"
        assert (ROOT / target).exists(), f"{name}: link to {path}, which does not exist"
        return label

    return _LINK.sub(rewrite, markdown)
