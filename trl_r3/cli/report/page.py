"""One page that holds everything: text, style and images."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from .pictures import Picture
from .run_data import RunData

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
figure { margin: 2.5rem 0; } img { max-width: 100%; height: auto; } table { border-collapse: collapse; }
td { padding: 0.1rem 1rem 0.1rem 0; vertical-align: top; } td:first-child { color: #666; white-space: nowrap; }
.lacking { background: #fff6e0; padding: 0.8rem 1rem; border-left: 4px solid #e0a800; } .lacking ul { margin: 0; }
""".strip()


def write(data: RunData, pictures: list[Picture], output: Path) -> Path:
    """
    Write `report.html` and a PNG for each picture.

    Args:
        data ([`RunData`]):
            What was read.
        pictures (list of [`Picture`]):
            What was drawn.
        output (`Path`):
            Folder, made if it is not there.

    Returns:
        `Path`: The page.
    """
    output.mkdir(parents=True, exist_ok=True)
    figures = []
    for picture in pictures:
        content = io.BytesIO()
        picture.figure.savefig(content, format="png", dpi=110)
        (output / f"{picture.name}.png").write_bytes(content.getvalue())
        figures.append(_figure(picture, content.getvalue()))
    page = output / "report.html"
    page.write_text(_page(data, figures), encoding="utf-8")
    return page


def _figure(picture: Picture, png: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return (
        f'<figure id="{picture.name}"><h2>{escape(picture.title)}</h2>\n<p>{escape(picture.look_for)}</p>\n'
        f'<img alt="{escape(picture.title)}" src="{source}"></figure>'
    )


def _page(data: RunData, figures: list[str]) -> str:
    rows = "\n".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in _about(data))
    lacking = "".join(f"<li>{escape(each)}</li>" for each in data.lacking)
    note = f'<div class="lacking"><p>What is not here:</p><ul>{lacking}</ul></div>' if lacking else ""
    body = "\n".join(figures)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Routing report: {escape(data.folder.resolve().name)}</title>
<link rel="icon" href="data:,"><style>{_STYLE}</style></head>
<body><h1>Routing report</h1>
<table>{rows}</table>
{note}
{body}
</body></html>
"""


def _about(data: RunData) -> list[tuple[str, str]]:
    about = [("run", data.folder.resolve().name)]
    logged = sorted({step for curve in data.log.values() for step in curve})
    if logged:
        about.append(("log", f"steps {logged[0]} to {logged[-1]}"))
    facts = data.facts
    if facts is None:
        return about
    steps = [step.step + 1 for step in data.steps]
    return [
        *about,
        ("traces", f"{len(steps)} steps, {steps[0]} to {steps[-1]}, by {facts.num_ranks} process(es)"),
        (
            "replays",
            {"R3": "what the rollout recorded", "R2": "what the old policy recorded"}.get(facts.mode, facts.mode),
        ),
        ("model", f"{facts.model_type}, {facts.dtype}, autocast {facts.autocast}, attention {facts.attention}"),
        (
            "routers",
            f"{len(facts.moe_layers)} MoE layers of {facts.num_decoder_layers}, top-{facts.top_k} of "
            f"{facts.num_experts} experts",
        ),
        ("computed on", f"{facts.device}, {facts.processor}"),
        ("versions", ", ".join(f"{name} {value}" for name, value in facts.versions.items())),
    ]
