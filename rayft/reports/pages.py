"""Plain data to HTML: one page, which renders its own data, for reports that open offline and for the dashboard.

The data are in the page as JSON; the scripts in `web/` turn them into text, tables and plotly figures. A report holds
all that it needs, the dashboard's page refers to what the server has.
"""

from __future__ import annotations

import html
import json
import pkgutil

from rayft import storage
from rayft.finite import finite
from rayft.reports.overview import page
from rayft.reports.snapshots import Files, Json

SCRIPTS = ("charts.js", "table.js", "page.js", "sweep.js")  # each uses only those before it
STYLE = "page.css"
PLOTLY = "plotly.js"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} - rayft</title>
<link rel="icon" href="data:,">
{style}
</head>
<body{attributes}>
<main><div id="alarm" role="status" hidden></div><div id="page"></div></main>
<noscript>This page draws itself with JavaScript, which is turned off here.</noscript>
<script type="application/json" id="data">{data}</script>
{scripts}
</body>
</html>
"""


def write_report(folder: str, output: str | None = None) -> Json:
    """Writes the page of a run or a sweep to one HTML file that opens offline.

    `output` is a path or an URL; None: `<name>.html`, with `-` for each `/`, in the working folder. Gives {"report",
    "kind", "bytes"}; StorageMissing where `folder` is neither a run nor a sweep. An output that can't be written is
    refused before anything is read.
    """
    storage.check_writable(output or ".", file=output is not None)
    data = page(Files(), folder)
    text = report(data).encode(errors="replace")
    target = output or str(data["name"]).replace("/", "-") + ".html"
    storage.write_bytes(target, text)
    return {"report": target, "kind": data["kind"], "bytes": len(text)}


def report(data: Json) -> str:
    """The page with everything in it."""
    scripts = "\n".join(f"<script>\n{asset(name)}\n</script>" for name in (PLOTLY, *SCRIPTS))
    return _filled(data, f"<style>\n{asset(STYLE)}</style>", scripts, "", to_json(data))


def live(data: str, title: str, source: str, version: str, assets: str) -> str:
    """The page as the dashboard serves it.

    `data` is what `to_json` gave, `version` its ETag; fresh data come from the path `source`, and the scripts lie below
    the path `assets`.
    """
    attributes = f' data-live="{html.escape(source)}" data-version="{html.escape(version)}"'
    style = f'<link rel="stylesheet" href="{assets}{STYLE}">'
    scripts = "\n".join(f'<script src="{assets}{name}"></script>' for name in (PLOTLY, *SCRIPTS))
    return _filled({"name": title}, style, scripts, attributes, data)


def asset(name: str) -> str:
    """The text of a script or the style sheet."""
    if name == PLOTLY:
        from plotly.offline import get_plotlyjs

        text: str = get_plotlyjs()
        return text
    found = pkgutil.get_data("rayft.reports", f"web/{name}")
    if found is None:
        raise FileNotFoundError(f"rayft/reports/web/{name} is missing from this installation")
    return found.decode()


def to_json(data: Json) -> str:
    """JSON in ASCII that can stand in a script element, whatever names say: no `<` that could end it."""
    try:
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(finite(data), separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _filled(data: Json, style: str, scripts: str, attributes: str, text: str) -> str:
    title = html.escape(str(data["name"]))
    return _PAGE.format(title=title, style=style, scripts=scripts, attributes=attributes, data=text)
