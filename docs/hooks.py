"""Builds pages of the site from files elsewhere in the repository, and rewrites the links between them."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# The pages that hold the text of a file.
PAGES = {
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the plots of the benchmarks."""
    for plot in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Return the text of a page, with the links that the site can follow."""
    if page.file.src_uri in PAGES:
        markdown = (ROOT / PAGES[page.file.src_uri]).read_text(encoding="utf-8")
    for name, file in PAGES.items():
        markdown = markdown.replace(f"](../{file}", f"]({name}").replace(f"]({file}", f"]({name}")
    return markdown.replace("](../docs/", "](").replace("](docs/", "](")
