"""What mkdocs does beside its plugins: pages written from the code, parts of the README, and links out of docs/.

A line `<!-- README: Evidence, The shipped models -->` of a page is replaced by these sections of README.md, so that a
table stands in one file only.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "docs" / "tools"))

import reference  # noqa: E402  (beside this file)

SECTIONS = re.compile(r"^<!-- README: (.+) -->$", re.MULTILINE)
README_PAGE = "results.md"  # where the README's anchors lead to


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are written from the code."""
    for name, text in reference.pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The README's sections in the place of their comments, and links that hold within the site."""
    text = SECTIONS.sub(lambda match: "\n\n".join(readme_section(title) for title in match[1].split(", ")), markdown)
    text = text.replace("](docs/", "](")  # as the README writes its links
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"\]\((?:\.\./)*README\.md(#[\w-]+)?\)", lambda match: f"]({up}{README_PAGE}{match[1] or ''})", text)


def readme_section(title: str) -> str:
    """A section `## title` of README.md, with its heading. Raises PluginError if there is none."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise PluginError(f"README.md has no section '## {title}', which a page of docs/ takes in.")
    return found[0].rstrip()
