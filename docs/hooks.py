"""Hooks of mkdocs: publish files outside docs/pages that the pages link to, and turn formulas into MathML.

A page links to `../../configs/quickstart.yaml`, which also works where the repository is browsed; on the site this file
is `files/configs/quickstart.yaml`. Formulas become MathML when the site is built, so that readers load no script.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\(\.\./\.\./([^)#]+)\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the linked files of the checkout to the site."""
    linked = {path for page in files.documentation_pages() for path in LINK.findall(page.content_string)}
    for path in sorted(linked):
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Let links to files of the checkout point to their copies on the site."""
    return LINK.sub(r"](files/\1)", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Replace LaTeX by MathML."""
    return FORMULA.sub(_mathml, content)


def _mathml(match: re.Match[str]) -> str:
    kind, formula = match.groups()
    return convert(html.unescape(formula).strip(), display="block" if kind == "div" else "inline")
