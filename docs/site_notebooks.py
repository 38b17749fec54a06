"""What the site makes of the notebooks: a page of each, with its text, code, outputs and figures, and the file to download."""

import base64
import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


FOLDER = Path(__file__).parent / "notebooks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page and its figures for each notebook; the notebooks themselves are files of `docs`."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        text, figures = page_of(json.loads(path.read_text()), path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in figures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def page_of(notebook: dict, name: str) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its figures by file name."""
    figures: dict[str, bytes] = {}
    title, *parts = (part for cell in notebook["cells"] for part in _parts(cell, name, figures))
    # as HTML: to the hook of links, a notebook is its page
    file = f'<a href="../{name}.ipynb" download>Download this notebook</a>'
    link = f"*{file} and run it in Jupyter, or in Colab by File, Upload notebook.*"
    return "\n\n".join([title, link, *parts]) + "\n", figures


def _parts(cell: dict, name: str, figures: dict[str, bytes]):
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        shown = output.get("data", {"text/plain": output.get("text", "")})
        if "image/png" in shown:
            figure = f"{name}-{len(figures) + 1}.png"
            figures[figure] = base64.b64decode(shown["image/png"])
            yield f"![What the cell above draws]({figure})"
        elif "text/html" in shown:
            yield "".join(shown["text/html"])
        else:
            yield "```text\n" + "".join(shown["text/plain"]).rstrip("\n") + "\n```"
