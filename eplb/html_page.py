"""The shell of our HTML pages: one file with nothing to fetch, readable in light and in dark, and its small parts.

Knows no balancedness. All text that comes from outside goes through `escape`.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

LIGHT_PALETTE = ("#c2410c", "#1d4ed8", "#0f766e", "#7e22ce", "#a16207", "#be185d")
_DARK_PALETTE = ("#fb923c", "#7aa7ff", "#2dd4bf", "#c99bff", "#facc15", "#f472b6")

_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1c2330;--soft:#5b6575;--line:#e2e6ec;--panel:#f7f8fa;LIGHT}
@media(prefers-color-scheme:dark){:root{--page:#12151c;--ink:#e6e9ef;--soft:#98a2b3;--line:#2a303c;--panel:#191e28;DARK}}
*{box-sizing:border-box}
body{margin:0 auto;padding:32px 28px 48px;max-width:1120px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:24px;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:17px;margin:36px 0 8px}
h3{font-size:14px;margin:16px 0 6px;font-weight:600}
p{margin:4px 0 10px;max-width:90ch}
.soft{color:var(--soft)}
.lead{border-left:3px solid var(--c1);background:var(--panel);padding:10px 16px;margin:16px 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:8px 0}
th,td{padding:4px 12px 4px 0;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--soft);font-size:13px;vertical-align:bottom}
th.n,td.n{text-align:right}
details summary{cursor:pointer;color:var(--soft);margin:8px 0}
svg.chart{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:12px}
svg text.axis{fill:var(--ink)}
svg .grid{stroke:var(--line);stroke-width:1}
svg .tick{stroke:var(--soft);stroke-width:1}
svg polyline{fill:none;stroke-width:1.6;stroke-linejoin:round}
svg line{stroke-width:2}
svg .dashed polyline,svg line.dashed{stroke-dasharray:5 4}
svg .muted polyline,svg line.muted{stroke:var(--soft)}
svg .muted circle{fill:var(--soft)}
svg image{image-rendering:pixelated}
SERIES
.legend{display:flex;flex-wrap:wrap;gap:2px 20px;font-size:13px;color:var(--soft);margin:4px 0}
.legend svg{margin-right:6px;vertical-align:middle}
.bar{display:inline-block;height:9px;background:var(--c0);vertical-align:middle}
"""

_SERIES = "\n".join(
    f"svg .c{i} polyline,svg line.c{i}{{stroke:var(--c{i})}}svg .c{i} circle{{fill:var(--c{i})}}" for i in range(len(LIGHT_PALETTE))
)


def page(title: str, sections: Sequence[str], script: str = "") -> str:
    """A whole document. sections: HTML; script: our own JavaScript, run last."""
    style = _STYLE.replace("LIGHT", _variables(LIGHT_PALETTE)).replace("DARK", _variables(_DARK_PALETTE)).replace("SERIES", _SERIES)
    body = "\n".join(sections) + (f"\n<script>{script}</script>" if script else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric_from: int = 1) -> str:
    """Cells are HTML already; columns from `numeric_from` on are right-aligned."""
    css = ['class="n"' if column >= numeric_from else "" for column in range(len(header))]
    head = "".join(f"<th {css[column]}>{cell}</th>" for column, cell in enumerate(header))
    body = "".join("<tr>" + "".join(f"<td {css[column]}>{cell}</td>" for column, cell in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _variables(palette: Sequence[str]) -> str:
    return "".join(f"--c{i}:{colour};" for i, colour in enumerate(palette))
