"""What the site takes from outside docs/: a hook of mkdocs."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = (
    "benchmarks/RESULTS.md",
    "benchmarks/peers/README.md",
    "benchmarks/records/chaos-2026-11-21.json",
    "benchmarks/records/slide-faults-2026-11-30.json",
    "cluster/README.md",
    "k8s/README.md",
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside, at the paths that they have in the repository."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Mend links across docs/, which is the root of the site."""
    if page.file.src_uri not in OUTSIDE:
        # The code is no page of the site.
        markdown = re.sub(r"\[([^\]]+)\]\(\.\./medray/[^)]*\)", r"\1", markdown)
        up = "../" * page.file.src_uri.count("/")
        return markdown.replace(f"](../{up}", f"]({up}")  # one level less above docs/
    markdown = re.sub(r"\]\(\.\./docs/", "](../", markdown)
    return re.sub(r"\[([^\]]+)\]\(\.\./k8s/?\)", r"`\1`", markdown)
