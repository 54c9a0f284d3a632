"""A heat map of layers x GPUs as inline SVG: one embedded picture, labelled axes, the ramp, and a tooltip for every cell.

Knows numbers only; one picture instead of a rectangle per cell keeps a page of 58 layers x 1,000 GPUs small.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesaic.eplb.heat_map import RAMP, png_data_uri

_WIDTH, _LEFT, _TOP, _FOOT = 440, 44, 4, 40
_RAMP_LEFT, _RAMP_WIDTH = 10, 240

TOOLTIP_SCRIPT = """
const tip=document.createElement('div');
tip.style.cssText='position:fixed;pointer-events:none;display:none;padding:3px 8px;font-size:12px;'
+'background:var(--ink);color:var(--page)';
document.body.append(tip);
for(const image of document.querySelectorAll('image[data-loads]')){
const loads=JSON.parse(image.dataset.loads),layers=JSON.parse(image.dataset.layers);
image.onmousemove=event=>{
const box=image.getBoundingClientRect();
const at=(offset,size,count)=>Math.max(0,Math.min(count-1,Math.floor(offset/size*count)));
const row=at(event.clientY-box.top,box.height,loads.length),column=at(event.clientX-box.left,box.width,loads[0].length);
tip.textContent=`layer ${layers[row]}, GPU ${column}: ${(loads[row][column]/100).toFixed(2)} x mean`;
tip.style.display='block';tip.style.left=Math.min(event.clientX+12,innerWidth-200)+'px';tip.style.top=event.clientY+12+'px'};
image.onmouseleave=()=>tip.style.display='none'}
"""


def heat_map(loads: NDArray[np.float64], layer_ids: Sequence[int], limit: float) -> str:
    """loads [L, G], 1.0 being the mean of the layer; the ramp ends at `limit`. Needs TOOLTIP_SCRIPT once on the page."""
    num_layers, num_gpus = loads.shape
    height = int(np.clip(420 / num_layers, 6, 28) * num_layers)
    foot = _TOP + height
    percent = json.dumps(np.rint(loads * 100).astype(int).tolist(), separators=(",", ":"))
    row_labels = (
        _text(_LEFT - 6, _TOP + (row + 0.5) * height / num_layers + 4, layer_ids[row], "end")
        for row in label_places(num_layers, 12)
    )
    column_labels = (_text(_LEFT + (gpu + 0.5) * _WIDTH / num_gpus, foot + 15, gpu, "middle") for gpu in label_places(num_gpus, 10))
    return (
        f'<svg class="chart" viewBox="0 0 {_LEFT + _WIDTH + 4} {foot + _FOOT}" role="img">'
        f'<image x="{_LEFT}" y="{_TOP}" width="{_WIDTH}" height="{height}" preserveAspectRatio="none" data-loads="{percent}" '
        f'data-layers="{list(layer_ids)}" href="{png_data_uri(loads, limit)}"/>{"".join(row_labels)}{"".join(column_labels)}'
        f'<text class="axis" x="{_LEFT + _WIDTH / 2}" y="{foot + 33}" text-anchor="middle">GPU</text>'
        f'<text class="axis" transform="translate(11 {_TOP + height / 2}) rotate(-90)" text-anchor="middle">layer</text></svg>'
    )


def ramp(limit: float) -> str:
    """The colours' legend. Once per page: its gradient has an id."""
    stops = "".join(f'<stop offset="{i / (len(RAMP) - 1)}" stop-color="{colour}"/>' for i, colour in enumerate(RAMP))
    marks = np.arange(0.0, limit, 0.5 if limit <= 2 else 1.0)
    labels = "".join(_text(_RAMP_LEFT + _RAMP_WIDTH * mark / limit, 26, f"{mark:g}", "middle") for mark in marks)
    return (
        f'<svg width="400" height="32"><defs><linearGradient id="ramp">{stops}</linearGradient></defs>'
        f'<rect x="{_RAMP_LEFT}" y="2" width="{_RAMP_WIDTH}" height="10" fill="url(#ramp)"/>{labels}'
        f"{_text(_RAMP_LEFT + _RAMP_WIDTH - 3, 26, f'{limit:g} x mean, or more', 'start')}</svg>"
    )


def label_places(count: int, most: int) -> range:
    """Which of `count` places get a label: even steps of 1, 2, 4, 8, ... with at most `most` labels."""
    step = 1
    while count > most * step:
        step *= 2
    return range(0, count, step)


def _text(x: float, y: float, text: object, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'
