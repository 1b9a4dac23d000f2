"""What pages of results share: one file that needs nothing else, offline too; interactive figures by plotly."""

import base64
import gzip
import html
import json
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from plotly.offline import get_plotlyjs

# The browser itself refuses whatever would come from elsewhere or go there.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'"
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff }
body { max-width: 1080px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.6em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
h3 { font-size: 1em; margin-bottom: 0.3em }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid #eee }
th, td { white-space: nowrap } td.long { white-space: normal; overflow-wrap: anywhere; min-width: 20em }
th { border-bottom: 1px solid #888 }
.wide { overflow-x: auto }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 0 1.5em }
pre { background: #f6f6f6; padding: 8px 12px; font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere }
figure { margin: 1.5em 0; min-width: 0 } figcaption { color: #555; font-size: 13px }
img { max-width: 100% }
.good { color: #007a3d } .bad { color: #c00000 }
"""

# plotly's script is unpacked and run first. Its bar of buttons covers legends: dragging zooms, a double click undoes.
DRAW = """
(async () => {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const bytes = new ReadableStream({ start(controller) { controller.enqueue(packed); controller.close(); } });
  const script = document.createElement("script");
  script.textContent = await new Response(bytes.pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
  const config = { displayModeBar: false, responsive: true };
  for (const source of document.querySelectorAll("script.figure")) {
    const { data, layout } = JSON.parse(source.textContent);
    await Plotly.newPlot(source.nextElementSibling, data, layout, config);
  }
})();
"""


def document(title: str, body: Sequence[str], *, figures: bool = True) -> str:
    """The whole file; the parts of `body` are HTML in which whatever comes from outside is escaped.

    Args:
        figures: whether there are plotly figures in it, which take their script along.
    """
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>",
        f"<style>{STYLE}</style>",
    ]
    plotly = [f'<script type="text/plain" id="plotly">{_packed_plotly()}</script>', f"<script>{DRAW}</script>"]
    scripts = plotly if figures else []
    content = [*head, "</head>", "<body>", *body, *scripts, "</body>", "</html>"]
    return "\n".join(["<!DOCTYPE html>", '<html lang="en">', "<head>", *content]) + "\n"


@cache
def _packed_plotly() -> str:
    """4.8 MB of script in 2 MB; the same bytes every time."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{content}\n</section>"


def figure(name: str, title: str, caption: str, drawing: dict[str, Any]) -> str:
    """A plotly figure (`data` and `layout`, plain JSON) with its words; `name` is the id of its element.

    plotly reads its texts as HTML: those of `drawing` have to be escaped.
    """
    drawn = json.dumps(drawing, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f"<figure><strong>{html.escape(title)}</strong>"
        f'<script type="application/json" class="figure">{drawn}</script>'
        f'<div id="{name}" class="plotly-graph-div"></div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def details(title: str, text: str) -> str:
    """A text that opens on a click."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    def row(cells: Iterable[str]) -> str:
        return "<tr>" + "".join(cells) + "</tr>"

    def cell(text: str) -> str:
        kind = ' class="long"' if len(text) > 40 else ""
        return f"<td{kind}>" + html.escape(text).replace("\n", "<br>") + "</td>"

    head = row(f"<th>{html.escape(name)}</th>" for name in header)
    body = "\n".join(row(map(cell, cells)) for cells in lines)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
