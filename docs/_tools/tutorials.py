"""Run the tutorials and write their pages: `make tutorials`. A page is a percent notebook, what it prints and draws.

The notebooks (docs/tutorials/*.py) are what is edited; the pages and their pictures are committed, so that the site is
built without running anything.
"""

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parents[1] / "tutorials"


def code_cells(notebook: Path) -> list[str]:
    """The code of a percent notebook, a string for each cell."""
    cells = re.split(r"^# %%(.*)\n", notebook.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [body.strip() for kind, body in zip(cells[1::2], cells[2::2], strict=True) if "markdown" not in kind]


def main() -> None:
    import jupytext
    from nbclient import NotebookClient
    from nbconvert import MarkdownExporter

    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    for path in sorted(SOURCES.glob("*.py")):
        print(f"running {path.name}", file=sys.stderr, flush=True)
        notebook: Any = jupytext.read(path)
        NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
        name = path.stem
        text, found = MarkdownExporter().from_notebook_node(notebook, {"output_files_dir": f"{name}_files"})
        shutil.rmtree(path.with_name(f"{name}_files"), ignore_errors=True)
        for file, data in found["outputs"].items():
            target = SOURCES / file
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(data)
        path.with_suffix(".md").write_text(page(text, name), encoding="utf-8")


def page(text: str, name: str) -> str:
    """The Markdown of a page: links lead to pages, pictures have words for those who do not see them."""
    note = f"\n\nMade by `make tutorials` from [{name}.py]({name}.py), a notebook for Jupyter (jupytext) as it is.\n"
    text = re.sub(r"\]\((\w+)\.py\)", r"](\1.md)", text)
    text = text.replace("![png](", "![what the code above draws](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + note


if __name__ == "__main__":
    main()
