"""A timeline's picture as inline SVG. Its colours are CSS variables, so it is readable in light and in dark.

`STYLE` and `legend` go into the page once. With `SCRIPT` the wheel zooms in time around the cursor, dragging moves the picture, a
double click resets it; without, it is the same picture standing still.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from moesaic.overlap.timeline_picture import Bar, Picture, PictureRow, fitted

WIDTH = 1040
_LEFT, _RIGHT, _TOP, _FOOT = 112, 10, 6, 40
_LANE, _CPU, _GAP, _RANK_GAP = 26, 18, 4, 16
_CHARACTER = 6.0
_CENTRE = 3.6
_WIDE, _SEAM = 4.0, 0.7
"""Neighbours are told apart by a seam; between narrow ones it would look like idle time."""

STYLE = """
svg.timeline{display:block;width:100%;height:auto;cursor:grab;touch-action:pan-y;user-select:none}
svg.timeline .field{fill:var(--panel);stroke:var(--line)}
svg.timeline .m0{fill:var(--m0)}svg.timeline .m1{fill:var(--m1)}svg.timeline .none{fill:var(--soft)}
svg.timeline .cpu .span{fill-opacity:.42}
svg.timeline .span.wait{fill:url(#wait);stroke:var(--soft);fill-opacity:1}
svg.timeline .open{fill:var(--alarm)}
svg.timeline .words text{fill:#fff;font-size:11px;text-anchor:middle;pointer-events:none}
svg.timeline .cpu .words text{fill:var(--ink)}
svg.timeline text.rank{fill:var(--ink);font-weight:600}
.key{display:inline-block;width:22px;height:11px;margin-right:6px;vertical-align:-1px}
"""

SCRIPT = """
for(const svg of document.querySelectorAll('svg.timeline')){
const [left,right]=[+svg.dataset.left,+svg.dataset.right],whole=[+svg.dataset.start,+svg.dataset.end];
const bars=[...svg.querySelectorAll('[data-s]')].map(e=>[e,+e.dataset.s,+e.dataset.e]);
const rows=[...svg.querySelectorAll('.words')].map(e=>[e,[...e.parentNode.querySelectorAll('[data-w]')].map(
b=>[+b.dataset.s,+b.dataset.e,b.dataset.w,+b.getAttribute('y')+b.getAttribute('height')/2+3.6])]);
const ticks=svg.querySelector('.ticks');let view=[...whole],grip=null,due=false;
const at=t=>left+(t-view[0])/(view[1]-view[0])*(right-left),clip=x=>Math.max(left,Math.min(right,x));
function draw(){due=false;
for(const [e,s,t] of bars){const a=clip(at(s)),b=clip(at(t));e.setAttribute('x',a);
e.setAttribute('width',Math.max(0,b-a>4?b-a-.7:b-a))}
for(const [words,named] of rows){words.textContent='';for(const [s,t,w,y] of named){
const a=clip(at(s)),b=clip(at(t)),fit=Math.floor((b-a-6)/6);if(fit<Math.min(5,w.length))continue;
const e=words.appendChild(document.createElementNS('http://www.w3.org/2000/svg','text'));
e.setAttribute('x',(a+b)/2);e.setAttribute('y',y);e.textContent=fit>=w.length?w:w.slice(0,fit-1)+'\\u2026'}}
const raw=(view[1]-view[0])/8,p=10**Math.floor(Math.log10(raw)),step=[1,2,5,10].find(f=>p*f>=raw*.999)*p;ticks.innerHTML='';
for(let t=Math.ceil(view[0]/step)*step;t<=view[1];t+=step){const x=at(t),y=+svg.dataset.foot;
ticks.insertAdjacentHTML('beforeend',`<line class="tick" x1="${x}" x2="${x}" y1="${y}" y2="${y+4}"/>`
+`<text x="${x}" y="${y+17}" text-anchor="middle">${+(t/svg.dataset.unit).toPrecision(6)}</text>`)}}
const later=()=>{if(!due){due=true;requestAnimationFrame(draw)}};
const time=event=>{const box=svg.getBoundingClientRect(),x=(event.clientX-box.left)*WIDTH/box.width;
return view[0]+(x-left)/(right-left)*(view[1]-view[0])};
function show(start,span){span=Math.max(.5,Math.min(span,whole[1]-whole[0]));
start=Math.max(whole[0],Math.min(start,whole[1]-span));view=[start,start+span];later()}
svg.addEventListener('wheel',event=>{event.preventDefault();const t=time(event),f=event.deltaY>0?1.25:.8;
show(t-(t-view[0])*f,(view[1]-view[0])*f)},{passive:false});
svg.addEventListener('pointerdown',event=>{grip=time(event);svg.setPointerCapture(event.pointerId)});
svg.addEventListener('pointermove',event=>{if(grip!==null)show(view[0]+grip-time(event),view[1]-view[0])});
svg.addEventListener('pointerup',()=>{grip=null});
svg.addEventListener('dblclick',()=>show(whole[0],whole[1]-whole[0]))}
""".replace("WIDTH", str(WIDTH))


def timeline_svg(picture: Picture) -> str:
    """The picture, its time axis below."""
    start, end = picture.window_us
    unit, unit_name = (1000.0, "ms") if end - start >= 2000 else (1.0, "us")
    height, body = _rows(picture)
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return (
        f'<svg class="timeline" viewBox="0 0 {WIDTH} {height + _FOOT:g}" role="img" data-left="{_LEFT}" '
        f'data-right="{WIDTH - _RIGHT}" data-start="{start:.3f}" data-end="{end:.3f}" data-foot="{height:g}" data-unit="{unit:g}">'
        f'{body}<g class="ticks">{"".join(_ticks(picture, height, unit))}</g>'
        f'<text class="axis" x="{middle}" y="{height + 34}" text-anchor="middle">{unit_name}</text></svg>'
    )


def legend() -> str:
    """What the colours mean, as HTML, and the hatching that the pictures refer to."""
    pattern = (
        '<svg width="0" height="0"><pattern id="wait" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="6" height="6" fill="var(--page)"/>'
        '<line y2="6" stroke="var(--soft)" stroke-width="3"/></pattern></svg>'
    )
    hatch = "repeating-linear-gradient(45deg,var(--soft) 0 2px,var(--page) 2px 5px)"
    keys = {
        "micro-batch 0": "var(--m0)",
        "micro-batch 1": "var(--m1)",
        "CPU waits for communication": hatch,
        "communication that nothing hides": "var(--alarm);height:4px;vertical-align:3px",
    }
    spans = (f'<span><i class="key" style="background:{colour}"></i>{name}</span>' for name, colour in keys.items())
    return f'<div class="legend">{"".join(spans)}{pattern}</div>'


def _rows(picture: Picture) -> tuple[float, str]:
    """(height, SVG)."""
    y: float = _TOP
    parts: list[str] = []
    rank = picture.rows[0].rank
    for row in picture.rows:
        if row.rank != rank:
            rank, y = row.rank, y + _RANK_GAP - _GAP
        lane_height = _CPU if row.label == "CPU" else _LANE
        height = row.num_lanes * lane_height
        parts.append(_row(picture, row, y, lane_height))
        y += height + _GAP
    return y, "".join(parts)


def _row(picture: Picture, row: PictureRow, y: float, lane_height: int) -> str:
    height = row.num_lanes * lane_height
    label_y, width = y + height / 2 + 4, WIDTH - _RIGHT - _LEFT
    rank = f'<text class="rank" x="0" y="{label_y}">rank {row.rank}</text>' if row.label == "CPU" else ""
    tops = [(bar, y + bar.lane * lane_height) for bar in row.bars]
    bars = "".join(_bar(picture, bar, top, lane_height) for bar, top in tops if not bar.wait)
    words = "".join(_words(picture, bar, top + lane_height / 2 + _CENTRE) for bar, top in tops if not bar.wait)
    waits = "".join(_bar(picture, bar, top, lane_height) for bar, top in tops if bar.wait)
    opened = "".join(_rect(picture, span, f'class="open" y="{y + height - 3:g}" height="3"') for span in row.exposed_us)
    return (
        f'<g class="{row.label.lower()}"><rect class="field" x="{_LEFT}" y="{y:g}" width="{width}" height="{height}"/>'
        f'{rank}<text x="{_LEFT - 8}" y="{label_y}" text-anchor="end">{row.label}</text>'
        f'{bars}<g class="words">{words}</g>{waits}{opened}</g>'
    )


def _bar(picture: Picture, bar: Bar, y: float, height: int) -> str:
    colour = "none" if bar.micro_batch is None else f"m{bar.micro_batch % 2}"
    label = f' data-w="{escape(bar.label)}"' if bar.label else ""
    css = f'class="span {colour}{" wait" if bar.wait else ""}" y="{y + 1:g}" height="{height - 2}"{label}'
    return _rect(picture, (bar.start_us, bar.end_us), css, bar.title)


def _rect(picture: Picture, span: tuple[float, float], css: str, title: str = "") -> str:
    x, width = _place(picture, span[0]), _place(picture, span[1]) - _place(picture, span[0])
    if width > _WIDE:
        width -= _SEAM
    tooltip = f"><title>{escape(title)}</title></rect>" if title else "/>"
    return f'<rect {css} x="{x:.2f}" width="{width:.2f}" data-s="{span[0]:.3f}" data-e="{span[1]:.3f}"{tooltip}'


def _words(picture: Picture, bar: Bar, y: float) -> str:
    """As much of the name as fits; the script knows the rest from the bar."""
    x, end = _place(picture, bar.start_us), _place(picture, bar.end_us)
    shown = fitted(bar.label, math.floor((end - x - 6) / _CHARACTER))
    return f'<text x="{(x + end) / 2:.2f}" y="{y:g}">{escape(shown)}</text>' if shown else ""


def _place(picture: Picture, time_us: float) -> float:
    """Pixels, within the field."""
    start, end = picture.window_us
    share = (time_us - start) / (end - start) if end > start else 0.0
    return _LEFT + min(1.0, max(0.0, share)) * (WIDTH - _RIGHT - _LEFT)


def _ticks(picture: Picture, foot: float, unit: float) -> Iterator[str]:
    start, end = picture.window_us
    step = round_step((end - start) / 8)
    for number in range(math.ceil(start / step), math.floor(end / step) + 1):
        x = _place(picture, number * step)
        yield (
            f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{foot}" y2="{foot + 4}"/>'
            f'<text x="{x:.1f}" y="{foot + 17}" text-anchor="middle">{number * step / unit:g}</text>'
        )


def round_step(least: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is not below `least`."""
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * 0.999)
