"""The charts of the report as Vega-Lite specs, written with Altair.

Specs leave the colours of text, axes and background to the page's config, so that one spec serves light and dark mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import altair as alt

Spec = dict[str, Any]
Row = dict[str, Any]

REPRESENTATIONS = {"pixels": "raw pixels", "untrained": "untrained encoder", "trained": "trained encoder"}
_GREY_TO_BLUE = ["#9aa1ad", "#8aa8d6", "#2f7de1"]
_MAX_POINTS = 240


def summarise(points: Sequence[tuple[float, float]], limit: int = _MAX_POINTS) -> list[Row]:
    """Reduce points to at most `limit` rows {x, y, low, high}: mean and extremes of stretches of consecutive points.

    The extremes are drawn as a band, so that a one-step spike is not averaged away.
    """
    size = math.ceil(len(points) / limit) or 1
    rows = []
    for start in range(0, len(points), size):
        xs, ys = zip(*points[start : start + size], strict=True)
        rows.append({"x": _short(sum(xs) / len(xs)), "y": _short(sum(ys) / len(ys)), "low": min(ys), "high": max(ys)})
    return rows


def curve(
    points: Sequence[tuple[float, float]],
    *,
    title: str,
    x_title: str,
    references: Mapping[str, float] | None = None,
    label_at: Literal["left", "right"] = "left",
    zero: bool = False,
) -> Spec:
    """A line over training with a band for its spread, and dashed lines at the `references` (label -> height)."""
    rows = summarise(points)
    banded = len(rows) < len(points)
    x = alt.X("x:Q", title=x_title, scale=alt.Scale(nice=False, zero=False), axis=alt.Axis(grid=False, tickCount=5))
    scale = alt.Scale(zero=zero, nice=True)
    y = alt.Y("y:Q", title=None, scale=scale, axis=alt.Axis(tickCount=5, format=".3~g"))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x)
    hover = alt.selection_point(nearest=True, on="pointerover", clear="pointerout", fields=["x"], empty=False)
    tips = [alt.Tooltip("x:Q", title=x_title, format=",.4~g"), alt.Tooltip("y:Q", title=title, format=".4~g")]
    layers: list[alt.Chart] = []
    if banded:
        layers.append(base.mark_area(opacity=0.22).encode(y=alt.Y("low:Q", title=None, scale=scale), y2="high:Q"))
    layers.append(base.mark_line(point={"size": 22} if len(rows) <= 40 else False).encode(y=y))
    if references:
        at = [{"y": height} for height in references.values()]
        layers.append(alt.Chart(alt.Data(values=at)).encode(y=y).mark_rule(style="reference"))
        heights = [0.0] * zero + [*references.values(), *(row[end] for row in rows for end in ("low", "high"))]
        said = alt.Data(values=_apart(references, 0.08 * (max(heights) - min(heights))))
        dx = -4 if label_at == "right" else 4
        labels = alt.Chart(said).encode(y=y).mark_text(style="reference-label", align=label_at, dx=dx)
        layers.append(labels.encode(x=alt.value("width" if label_at == "right" else 0), text="label:N"))
    shown = alt.when(hover).then(alt.value(1)).otherwise(alt.value(0))
    layers.append(base.mark_point(filled=True, size=55).encode(y=y, opacity=shown, tooltip=tips).add_params(hover))
    return _spec(alt.layer(*layers), 190, title)


def results(figures: Mapping[str, Mapping[str, float | None]]) -> Spec:
    """A bar chart of measure -> representation -> percent, the three representations side by side."""
    values = [
        {"measure": measure, "of": name, "percent": round(percent, 1)}  # here, as the page would round 75.25 up
        for measure, row in figures.items()
        for key, name in REPRESENTATIONS.items()
        if (percent := row.get(key)) is not None
    ]
    order = list(REPRESENTATIONS.values())
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("percent:Q", title="accuracy in percent", scale=alt.Scale(domain=[0, 100]), axis=alt.Axis(tickCount=5)),
        y=alt.Y(
            "measure:N", title=None, sort=list(figures), axis=alt.Axis(labelFontSize=13, ticks=False, domain=False)
        ),
        yOffset=alt.YOffset("of:N", sort=order, scale=alt.Scale(domain=order)),
        tooltip=[alt.Tooltip("of:N", title="features"), alt.Tooltip("percent:Q", format=".1f")],
    )
    colour = alt.Color("of:N", sort=order, scale=alt.Scale(domain=order, range=_GREY_TO_BLUE), legend=_legend())
    bars = base.mark_bar(cornerRadiusEnd=3).encode(color=colour)
    numbers = base.mark_text(style="number", align="left", dx=5).encode(text=alt.Text("percent:Q", format=".1f"))
    return _spec(alt.layer(bars, numbers), 78 * len(figures) + 10, "Results in percent, higher is better")


def embedding_map(rows: Sequence[Row], classes: Sequence[str] | None) -> Spec:
    """A scatter plot of `rows` {x, y, image, id, class?}, as dots or as the pictures themselves.

    Dragging pans and Shift + wheel zooms, so that the plain wheel and touch still scroll the page.
    """
    show = alt.param(
        name="show",
        value="dots" if classes else "pictures",
        bind=alt.binding_radio(options=["dots", "pictures"], name="show as "),
    )
    move = alt.selection_interval(
        bind="scales", translate="[mousedown, window:mouseup] > window:mousemove!", zoom="wheel![event.shiftKey]"
    )
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=_extent(rows, "x"), nice=False, zero=False))
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=_extent(rows, "y"), nice=False, zero=False))
    tips = [alt.Tooltip("class:N", title="title")] if classes else []
    tips += [alt.Tooltip("id:N", title="id"), alt.Tooltip("image:N", title="image")]
    base = alt.Chart(alt.Data(values=list(rows))).encode(x=x, y=y, tooltip=tips)
    dots = base.transform_filter("show == 'dots'").mark_circle(size=44)
    pictures = base.transform_filter("show == 'pictures'").mark_image(width=22, height=22).encode(url="image:N")
    if classes:
        # More than 20 colours cannot be told apart; the tooltip names the class instead.
        few = len(classes) <= 20
        scale = alt.Scale(domain=list(classes), scheme="tableau10" if len(classes) <= 10 else "tableau20")
        picked = alt.selection_point(fields=["class"], bind="legend")
        colour = alt.Color("class:N", scale=scale, legend=_legend() if few else None)
        faded = alt.when(picked).then(alt.value(0.85)).otherwise(alt.value(0.06))
        dots = dots.encode(color=colour, opacity=faded).add_params(picked)
        pictures = pictures.encode(opacity=faded)
    else:
        dots = dots.encode(opacity=alt.value(0.6))
    return _spec(alt.layer(dots.add_params(move, show), pictures), 560, "Map of the embedding")


def _legend() -> alt.Legend:
    columns = alt.ExprRef("max(1, floor(width / 125))")  # as many as fit: a phone gets two
    return alt.Legend(
        title=None, orient="top", direction="horizontal", columns=columns, symbolType="circle", labelLimit=140
    )


def _apart(references: Mapping[str, float], line: float) -> list[Row]:
    """Rows {y, label} from the top down; a label less than the height of a `line` below another is merged into it."""
    rows: list[Row] = []
    for label, height in sorted(references.items(), key=lambda item: -item[1]):
        if rows and rows[-1]["y"] - height < line:
            rows[-1]["label"] += f", {label}"
        else:
            rows.append({"y": height, "label": label})
    return rows


def _extent(rows: Sequence[Row], axis: str) -> list[float]:
    """The range of an axis with a margin; set explicitly, as the hidden layer has no data to derive it from."""
    low, high = min(row[axis] for row in rows), max(row[axis] for row in rows)
    margin = 0.03 * (high - low) or 1.0
    return [low - margin, high + margin]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _spec(chart: alt.LayerChart | alt.FacetChart, height: int, description: str) -> Spec:
    spec: Spec = chart.properties(width="container", height=height, description=description).to_dict()
    # The page has its own config; the schema's URL would be the page's only reference to the network.
    return {key: value for key, value in spec.items() if key not in ("$schema", "config")}
