"""What a notebook shows of a report: a short table."""

from collections.abc import Mapping, Sequence
from html import escape


def html_table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], more: str = "") -> str:
    """A table of text cells with a caption above it and, where rows were left out, a sentence below.

    Example:
        >>> html_table("two <a>", ["name", "scale"], [["w", "1.5"]])
        '<p>two &lt;a&gt;</p><table><tr><th>name</th><th>scale</th></tr><tr><td>w</td><td>1.5</td></tr></table>'
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    table = f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
    paragraphs = [f"<p>{escape(text).replace(chr(10), '<br>')}</p>" if text else "" for text in (caption, more)]
    return paragraphs[0] + table + paragraphs[1]


def farthest(distances: Mapping[str, float], count: int = 12) -> list[str]:
    """The names of the greatest distances, at most so many, in the order that they came in.

    Example:
        >>> farthest({"a": 0.1, "b": 0.3, "c": 0.2}, 2)
        ['b', 'c']
    """
    chosen = set(sorted(distances, key=distances.__getitem__, reverse=True)[:count])
    return [name for name in distances if name in chosen]
