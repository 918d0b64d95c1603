"""The report of an evaluation as one HTML file: tables, bounds, and a sheet of pictures inside it."""

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import torch
from PIL import Image

from ..images import to_bytes
from . import reconstruction
from .drawn import Shown
from .figures import bound_from_json

Rows = list[Sequence[str]]
LOSSLESS = 256  # px; larger pictures are embedded as JPEG
KINDS = ("true", "reconstruction", "drawn", "base model")

KNOWN = {
    "st-lpips-alex": "perceptual distance, ST-LPIPS (alex)",
    "st-lpips-vgg": "perceptual distance, ST-LPIPS (vgg)",
    "psnr": "PSNR, dB",
    "mottle": "mottle, 1/255 of grey",
    "mottle_ratio": "mottle / that of the reconstructions",
    "off_white": "share of the white ground off white",
    "base_error": "error of the drawn latent, base",
    "detail_error": "error of the drawn latent, detail",
    "base_survives": "base channels' picture with the drawing at 1/s, PSNR, dB",
    "native_error": "base model alone: error of its latent",
    "native_psnr": "base model alone: PSNR with the picture at 1/s, dB",
    "top1": "recall top-1",
    "top5": "recall top-5",
}
UNKNOWN = {
    "top1": "recall top-1",
    "top5": "recall top-5",
    "name": "nearest picture has the right name",
    "style": "nearest picture has the right style",
    "frechet-st-vgg": "Frechet distance on ST-VGG features",
}
EXPLAINED = (
    "Floor: what the pictures' own reconstructions have. Spread: standard deviation over the seeds.",
    "Mottle: root mean square, in 1/255 of grey, of what a 5x5 mean leaves over, where the true picture is flat. White "
    "ground: where the true picture is white, and all within 7x7 pixels; off white by more than 8/255. Errors of "
    "latents are mean squares in the model's units. Recall: the nearest of all pictures, small, is the caption's own.",
    "The Frechet distance is biased upwards by few pictures: compare it between equal counts only. It is no FID, and "
    "ST-LPIPS is no LPIPS.",
)
STYLE = """
:root { color-scheme: light dark; --line: #8885; --bad: #d33; --good: #2a8f4d; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
.pass { color: var(--good); } .FAIL { color: var(--bad); font-weight: 600; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(34rem, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { margin-top: .25rem; } small { opacity: .75; }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 4px; }
.row img { width: 100%; image-rendering: pixelated; display: block; }
.row small { display: block; text-align: center; }
"""


def number(value: float | None) -> str:
    """Four digits that count; a dash for what is not a number."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def tables(measured: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[str], Rows]]:
    """Every table as (title, head, rows)."""
    for part, words in (("known", KNOWN), ("unknown", UNKNOWN)):
        if told := measured[part]:
            rows: Rows = [
                (words[name], *(number(x) for x in (value["mean"], value["spread"], told["floor"].get(name))))
                for name, value in sorted(told["figures"].items(), key=lambda item: list(words).index(item[0]))
            ]
            seeds = ", ".join(map(str, told["seeds"]))
            yield f"{told['count']} {part} captions, seed {seeds}", ("", "mean", "spread", "floor"), rows
    if told := measured["held_out"]:
        title = f"Reconstruction of {told['count']} held-out pictures"
        yield title, ("", *told["reconstruction"]["davae"]), list(reconstruction.rows(told["reconstruction"]))
        title = f"Squared error of the velocity on {told['count']} held-out pictures, by noise level"
        yield title, *by_time(told["loss"])
    told = measured["known"]
    title = f"Squared error of the latent predicted in one step, {told['count']} known captions, by noise level"
    yield title, *by_time(told["denoised"])


def by_time(errors: Mapping[str, Mapping[str, float]]) -> tuple[Sequence[str], Rows]:
    """Head and rows of errors by noise level, as :func:`~.drawn.losses` gives them."""
    times = [name.partition("/")[2] for name in errors["adapted"] if name.startswith("base/")]
    lines = {
        "adapted model, base": (errors["adapted"], "base"),
        "adapted model, detail": (errors["adapted"], "detail"),
        "base model": (errors["base_model"], "base"),
    }
    rows: Rows = [
        (title, *(number(values[name]) for name in (*(f"{group}/{time}" for time in times), group) if name in values))
        for title, (values, group) in lines.items()
    ]
    mean = ["mean"] if "base" in errors["adapted"] else []
    return ("", *(time.replace("t", "t = ") for time in times), *mean), rows


def html(measured: Mapping[str, Any], known: Sequence[Shown], unknown: Sequence[Shown]) -> str:
    """The whole page; nothing is loaded from elsewhere."""
    sampling = measured["sampling"]["adapted"]
    settings = f"{measured['size']} px, {sampling['steps']} steps, cfg {sampling['cfg']:g}, shift {sampling['shift']:g}"
    sheets = {"Known captions": known, "Unknown captions": unknown}
    return report("Drawings of an adapted model", settings, measured, list(tables(measured)), sheets, EXPLAINED)


def report(
    title: str,
    settings: str,
    measured: Mapping[str, Any],
    tables: Sequence[tuple[str, Sequence[str], Rows]],
    sheets: Mapping[str, Sequence[Shown]],
    explained: Sequence[str],
) -> str:
    """A page of any evaluation.

    Args:
        title, settings: what is evaluated, and how.
        measured: what goes into the JSON file: ``bounds``, ``weights``, ``versions`` and ``not_measured`` are shown.
        tables: title, head and rows of each.
        sheets: rows of pictures by their title.
        explained: notes below the tables.
    """
    parts = [f"<h1>{escape(title)}</h1><p>{escape(settings)}</p>", "<h2>Bounds</h2>", _bounds(measured["bounds"])]
    for name, head, rows in tables:
        parts += [f"<h2>{escape(name)}</h2>", _table(head, rows)]
    parts += [f"<p><small>{escape(line)}</small></p>" for line in explained]
    for name, some in sheets.items():
        if some:
            parts += [f"<h2>{escape(name)}</h2>", '<div class="sheet">', *map(_figure, some), "</div>"]
    files = [(role, digest[:16]) for role, digest in measured["weights"].items()]
    parts += ["<h2>Measured with</h2>", _table(("file", "SHA-256"), files)]
    parts.append(_table(("package", "version"), list(measured["versions"].items())))
    parts += [f"<p>Not measured: {escape(line)}</p>" for line in measured["not_measured"]]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _bounds(told: Sequence[Mapping[str, Any]]) -> str:
    bounds = [bound_from_json(bound) for bound in told]
    rows = [(bound.name, number(bound.value), bound.limits(), "pass" if bound.passed else "FAIL") for bound in bounds]
    return _table(("", "figure", "should be", ""), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marks = (f' class="{cell}"' if cell in ("pass", "FAIL") else "" for cell in cells)
        return "<tr>" + "".join(f"<{tag}{m}>{escape(c)}</{tag}>" for c, m in zip(cells, marks, strict=True)) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _figure(row: Shown) -> str:
    kinds = sorted(row.images, key=lambda kind: KINDS.index(kind) if kind in KINDS else len(KINDS))
    pictures = "".join(
        f'<div><img src="{data_uri(row.images[kind])}" alt="{kind}"><small>{kind}</small></div>' for kind in kinds
    )
    told = [
        f"{name} {number(row.figures[name])}" for name in ("st-lpips-alex", "psnr", "mottle") if name in row.figures
    ]
    said = f"{escape(row.caption)} <small>{', '.join(told)}</small>"
    return f'<figure><div class="row">{pictures}</div><figcaption>{said}</figcaption></figure>'


def data_uri(image: torch.Tensor) -> str:
    """``[3, H, W]`` in [-1, 1] as the source of an HTML image: PNG, or JPEG above 256 px."""
    kind = "PNG" if max(image.shape[1:]) <= LOSSLESS else "JPEG"
    data = io.BytesIO()
    Image.fromarray(to_bytes(image)).save(data, kind, **({"quality": 92, "subsampling": 0} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
