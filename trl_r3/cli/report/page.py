"""One page that holds everything: verdict, text, style and images, of one run or of two side by side."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from .differences import differences
from .drawing import Picture
from .pictures import pictures
from .run_data import RunData
from .run_verdict import WINDOW, RunVerdict
from .step_curves import mismatch

_STYLE = """
:root { color-scheme: light dark; --text: #222; --soft: #666; --back: #fff; --line: #ddd;
--good: #2ca02c; --bad: #d62728; --note: #e0a800; }
@media (prefers-color-scheme: dark) { :root { --text: #ddd; --soft: #999; --back: #181a1b; --line: #444; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem;
color: var(--text); background: var(--back); }
h1 { margin: 0 0 1rem; } .runs { display: flex; gap: 1.5rem; } .runs > * { flex: 1; min-width: 0; }
.verdict, .lacking { border-left: 4px solid var(--note); padding: 0.2rem 1rem; margin: 0 0 1rem; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.verdict h2 { margin: 0; } .verdict p, .verdict ul, .lacking ul { margin: 0.4rem 0; }
.verdict ul, .lacking ul { padding-left: 1.2rem; }
.verdict small { color: var(--soft); display: block; }
.verdict.bad li { font-weight: 600; } .verdict li small { font-weight: normal; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: 0.1rem 1.2rem 0.1rem 0; vertical-align: top;
text-align: left; border-top: 1px solid var(--line); } td:first-child, th { color: var(--soft); font-weight: normal; }
figure { margin: 2.5rem 0; } figure img { width: 100%; height: auto; border-radius: 4px; }
figure > img { max-width: max-content; }
""".strip()


_NOTHING = "<div>not logged by this run</div>"


def write(runs: Sequence[tuple[RunData, RunVerdict]], output: Path) -> Path:
    """
    Write `report.html` and a PNG for each picture.

    Args:
        runs (sequence of `tuple[RunData, RunVerdict]`):
            What was read of one run or of two, and what it comes to.
        output (`Path`):
            Folder, made if it is not there.

    Returns:
        `Path`: The page.
    """
    output.mkdir(parents=True, exist_ok=True)
    figures, together = [], None
    by_run = [{picture.name: picture for picture in pictures(data)} for data, _ in runs]
    if len(runs) > 1:  # curves of both in the same axes
        together = mismatch(*(data for data, _ in runs))
    names = dict.fromkeys(name for drawn in by_run for name in drawn)
    for name in names:
        if name == "mismatch" and together is not None:
            figures.append(_figure([_image(together, output)], together))
            continue
        drawn = [(letter, each.get(name)) for letter, each in zip(_letters(runs), by_run, strict=True)]
        images = [_image(picture, output, letter) if picture else _NOTHING for letter, picture in drawn]
        figures.append(_figure(images, next(filter(None, (picture for _, picture in drawn)))))
    page = output / "report.html"
    page.write_text(_page(runs, figures), encoding="utf-8")
    return page


def _letters(runs: Sequence) -> tuple[str, ...]:
    return ("A", "B") if len(runs) > 1 else ("",)


def _image(picture: Picture, output: Path, letter: str = "") -> str:
    content = io.BytesIO()
    picture.figure.savefig(content, format="png", dpi=110)
    (output / f"{letter and letter + '-'}{picture.name}.png").write_bytes(content.getvalue())
    source = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    image = f'<img alt="{escape(f"{letter} {picture.title}".strip())}" src="{source}">'
    return f"<div>{letter}{image}</div>" if letter else image


def _figure(images: list[str], picture: Picture) -> str:
    shown = images[0] if len(images) == 1 else f'<div class="runs">{"".join(images)}</div>'
    text = f"<h2>{escape(picture.title)}</h2>\n<p>{_text(picture.look_for)}</p>"
    return f'<figure id="{picture.name}">{text}\n{shown}</figure>'


def _page(runs: Sequence[tuple[RunData, RunVerdict]], figures: list[str]) -> str:
    names = [f"{letter}: {data.name}" for letter, (data, _) in zip(("A", "B"), runs, strict=False)]
    is_one = len(runs) == 1
    verdicts = "".join(
        _verdict(verdict, data, "" if is_one else name) for name, (data, verdict) in zip(names, runs, strict=True)
    )
    title = f"Routing report: {runs[0][0].name if is_one else ' and '.join(names)}"
    body = "\n".join(figures)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<link rel="icon" href="data:,"><style>{_STYLE}</style></head>
<body><h1>{escape(title if is_one else "Routing report")}</h1>
<div class="runs">{verdicts}</div>
{"" if is_one else _differences(runs, names)}
{body}
{_about_table(runs, names)}
</body></html>
"""


def _verdict(verdict: RunVerdict, data: RunData, name: str) -> str:
    kind = {True: "good", False: "bad", None: "none"}[verdict.is_healthy]
    found = "".join(
        f"<li>{_text(str(each))}<small>{_text(each.healthy.outside)}</small></li>" for each in verdict.unhealthy
    )
    head = f"{escape(name)}: " if name else ""
    cut = f"<p>{escape(str(verdict.cut))}</p>" if verdict.cut else ""
    box = f'<div class="verdict {kind}"><h2>{head}{escape(verdict.headline)}</h2><ul>{found}</ul>{cut}</div>'
    lacking = "".join(f"<li>{_text(each)}</li>" for each in data.lacking)
    note = f'<div class="lacking">What is not here:<ul>{lacking}</ul></div>' if lacking else ""
    rows = "".join(_row([each.name, f"{each.value:.3g}{each.where}", str(each.healthy)]) for each in verdict.judged)
    head = f"<tr><th>mean of {WINDOW} logged steps</th><th>value</th><th>healthy</th></tr>"
    return f"<div>{box}{note}{f'<table>{head}{rows}</table>' if rows else ''}</div>"


def _text(text: str) -> str:
    return re.sub("`(.+?)`", r"<code>\1</code>", escape(text))


def _differences(runs: Sequence[tuple[RunData, RunVerdict]], names: list[str]) -> str:
    rows = "\n".join(_row([name, *values]) for name, values in differences(*(data for data, _ in runs)))
    head = "".join(f"<th>{escape(each)}</th>" for each in ("mean of the last steps", *names, "B against A"))
    return f'<table id="differences"><tr>{head}</tr>\n{rows}</table>'


def _about_table(runs: Sequence[tuple[RunData, RunVerdict]], names: list[str]) -> str:
    facts = [_about(data) for data, _ in runs]
    rows = "\n".join(_row([key, *(each.get(key, "") for each in facts)]) for key in {**facts[0], **facts[-1]})
    head = _row(["", *names]) if len(runs) > 1 else ""
    return f"<h2>{'The runs' if len(runs) > 1 else 'The run'}</h2><table>{head}{rows}</table>"


def _row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _about(data: RunData) -> dict[str, str]:
    about = {"folder": str(data.folder)}
    logged = sorted({step for curve in (*data.log.values(), *data.training.values()) for step in curve})
    if logged:
        about["log"] = f"steps {logged[0]} to {logged[-1]}"
    facts = data.facts
    if facts is None:
        return {**about, "ranges": "those of 8 of 128 experts: only traces tell how many there are"}
    steps = [step.step + 1 for step in data.steps]
    return {
        **about,
        "traces": f"{len(steps)} steps, {steps[0]} to {steps[-1]}, by {facts.num_ranks} process(es)",
        "replays": {"R3": "what the rollout recorded", "R2": "what the old policy recorded"}.get(
            facts.mode, facts.mode
        ),
        "model": f"{facts.model_type}, {facts.dtype}, autocast {facts.autocast}, attention {facts.attention}",
        "routers": f"{len(facts.moe_layers)} MoE layers of {facts.num_decoder_layers}, top-{facts.top_k} of "
        f"{facts.num_experts} experts",
        "computed on": f"{facts.device}, {facts.processor}",
        "versions": ", ".join(f"{name} {value}" for name, value in facts.versions.items()),
    }
