"""The page: everything that it shows is inside one HTML file, which asks no network for anything."""

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from drawing.colours import FIRST, HEAT, ORDER, SECOND
from drawing.trace import LOOKS
from PIL import Image

TEMPLATE = Path(__file__).with_name("page.html")
SMALL = 128  # pictures up to this size are stored without loss


def page(panels, traces, title: str, ratios) -> str:
    """
    Args:
        panels: the pictures.
        traces: for each question a list of traces, one for each method.
        title: a line for the head.
        ratios: the keep ratios to mark on the slider, among those of the traces.

    Returns:
        an HTML page.
    """
    data = {
        "panels": [{"label": panel.label, "src": data_uri(panel.picture)} for panel in panels],
        "sizes": [panel.picture.shape[1::-1] for panel in panels],
        "questions": [group[0].question for group in traces],
        "methods": [item.setting for item in traces[0]],
        "ratios": [round(ratio, 6) for ratio in traces[0][0].ratios],
        "marks": [traces[0][0].step(ratio) for ratio in sorted(ratios)],
        "runs": [[as_run(item) for item in group] for group in traces],
        "palettes": {"heat": as_colours(HEAT), "order": as_colours(ORDER)},
        "sides": as_colours([FIRST, SECOND]),
    }
    # "<" could end the script element, whatever string it stands in.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = TEMPLATE.read_text(encoding="utf-8")
    return template.replace("{{TITLE}}", html.escape(title)).replace("{{DATA}}", text)


def as_run(item) -> dict:
    """A trace for the page: masks as bits, the first token in the highest bit of the first byte."""
    return {
        "grids": item.grids,
        "counts": item.counts.tolist(),
        "masks": [base64.b64encode(np.packbits(mask)).decode() for mask in item.masks],
        "entry": item.entry.tolist(),
        "rank": item.rank.tolist(),
        "sets": [part.stop - part.start for part in item.set_slices],
        "exact": item.exact,
        "nested": item.nested,
        "joint": item.joint,
        "look": None if item.look is None else [float(f"{value:.4g}") for value in item.look],
        "lookName": LOOKS.get(item.look_name),
    }


def as_colours(colours) -> list:
    return ["#" + "".join(f"{int(value):02x}" for value in colour) for colour in colours]


def data_uri(picture: np.ndarray) -> str:
    kind = "png" if max(picture.shape[:2]) <= SMALL else "jpeg"
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format=kind, **({"optimize": True} if kind == "png" else {"quality": 88}))
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
