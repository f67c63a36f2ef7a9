"""The page: a summary of all stages, what is missing, and a section for each stage."""

import math
import time

import yaml

from data.remote.web_address import without_secrets
from jobs.report.charts import Axis, Series, line_chart
from jobs.report.content import RunContent, StageContent
from jobs.report.evaluation import final_evaluation, reported_evaluation
from jobs.report.history import history_table, marks, marks_legend, skipped_samples
from jobs.report.markup import Markup, element, facts, folded, joined, picture, table
from jobs.report.stage_facts import machine_facts, recipe_facts
from jobs.report.style import STYLE
from jobs.scheduler.stage_status import StageStatus

GENERATOR = "coatnet report"
_HEAD = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta name="generator" content="{GENERATOR}">'
    # Nothing is loaded and no script runs, whatever a name contains.
    '<meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
)
_PERCENT = Axis(lambda value: f"{100 * value:.3g}%")
_NUMBER = Axis(lambda value: f"{value:.4g}")
_FROM_ZERO = Axis(lambda value: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}", from_zero=True)
_LOGARITHMIC = Axis(lambda value: f"{value:.3g}", logarithmic=True)
_CHARTS: tuple[tuple[str, Axis, tuple[tuple[str, str, int], ...]], ...] = (
    ("Loss", _NUMBER, (("train/loss", "training", 0), ("validation/loss", "validation", 1))),
    (
        "Accuracy in validation", _PERCENT,
        (
            ("validation/top1", "top-1", 0),
            ("validation/precision_at_1", "precision@1", 0),
            ("validation/top5", "top-5", 2),
        ),
    ),
    ("Learning rate", _FROM_ZERO, (("train/learning_rate", "learning rate", 0),)),
    ("Norm of the gradient", _LOGARITHMIC, (("train/gradient_norm", "before clipping", 0),)),
    ("Images per second", _FROM_ZERO, (("train/images_per_second", "over all ranks", 0),)),
    (
        "Seconds of a step", _LOGARITHMIC,
        (("wall_time/step_p50_seconds", "median", 0), ("wall_time/step_p99_seconds", "99th percentile", 1)),
    ),
)  # fmt: skip
"""Title, axis, and tag, name and color of each curve."""


def page(content: RunContent, version: str) -> Markup:
    """The whole file. What turns out not to be shown is added to `content.missing`."""
    run, missing = content.run, content.missing
    sections = [_section(stage, missing) for stage in content.stages]
    made = time.strftime("%Y-%m-%d %H:%M:%S %z")
    header = element(
        "header",
        element("h1", run.name),
        element("p", f"Report of a run of CoAtNet, made {made}, from {run.path}", class_="soft"),
        element("nav", *(element("a", stage.name, href=f"#stage-{n}") for n, stage in enumerate(content.stages))),
        class_="top",
    )
    body = [
        header,
        Markup("<main>"),
        _summary([*content.jobs_before, *(stage.status for stage in content.stages)]),
        _missing(missing),
        *(element("section", section, id=f"stage-{number}") for number, section in enumerate(sections)),
        Markup("</main>"),
        element("footer", f"Made by {GENERATOR} {version}. The file contains all that it shows and loads nothing."),
    ]
    title = element("title", f"{run.name}: report")
    return Markup(f"{_HEAD}{title}<style>{STYLE}</style></head><body>{joined(body)}</body></html>\n")


def _summary(rows: list[StageStatus]) -> Markup:
    headings = ("stage", "state", "steps", "images/s", "loss", "top-1", "restarts", "checkpoint")
    right = ("steps", "images/s", "loss", "top-1", "restarts")

    def number(value: float | None, form: str) -> str:
        return "-" if value is None or not math.isfinite(value) else format(value, form)

    cells = [
        (
            row.stage,
            element("span", row.state, class_=f"state {row.state}"),
            number(row.step, ",") + (f" of {row.steps:,}" if row.steps and row.step != row.steps else ""),
            number(row.images_per_second, ",.0f"),
            number(row.loss, ".4f"),
            number(row.top1, ".2%"),
            number(row.restarts, ","),
            (row.checkpoint or "-").rpartition("/")[2],
        )
        for row in rows
    ]  # fmt: skip
    reasons = [
        element("p", element("b", row.stage), f" {row.state}: {row.reason}", class_="reasons")
        for row in rows
        if row.reason
    ]
    return element("section", element("h2", "Stages"), table(headings, cells, right), *reasons)


def _missing(missing: list[str]) -> Markup:
    if not missing:
        return Markup("")
    items = (element("li", what) for what in missing)
    return element("div", element("b", "Not in this report"), element("ul", *items), class_="missing")


def _section(stage: StageContent, missing: list[str]) -> Markup:
    state = element("span", stage.status.state, class_=f"state {stage.status.state}")
    parts: list[object] = [element("h2", stage.name, " ", state)]
    if not stage.folder.path.is_dir():
        return joined([*parts, element("p", "Not started yet.", class_="soft")])
    if rows := recipe_facts(stage):
        parts += [element("h3", "Recipe"), facts(rows)]
    if rows := machine_facts(stage):
        parts += [element("h3", "Machine and time"), facts(rows)]
    parts.append(_charts(stage))
    if stage.result is not None:
        parts.append(final_evaluation(stage.result, stage.setting("loss", "kind") == "sigmoid"))
    problems: list[str] = []
    parts += [reported_evaluation(folder, report, problems) for folder, report in stage.evaluations]
    if not stage.evaluations and (stage.trains or stage.result):
        command = element("code", f"coatnet evaluate {stage.folder.path} SHARDS")
        parts.append(
            element(
                "p", "A confusion matrix, calibration and the most confident mistakes are shown here after ", command,
                ", and making the report again.", class_="soft",
            )
        )  # fmt: skip
    parts += _first_images(stage, problems)
    missing += [f"{stage.name}: {problem}" for problem in problems]
    if stage.trains:
        parts += [element("h3", "Skipped samples"), skipped_samples(stage.entries)]
    parts += [element("h3", "What happened"), history_table(stage.entries)]
    if stage.settings:
        text = without_secrets(yaml.safe_dump(dict(stage.settings), sort_keys=False, width=math.inf))
        parts.append(folded("All settings of the stage", element("pre", text)))
    return joined(parts)


def _charts(stage: StageContent) -> Markup:
    scalars = stage.recorded.scalars
    placed = marks(stage.entries)
    steps = [points[-1].step for points in scalars.values() if points]
    last = max([stage.status.step or 0, *steps])
    drawn = [
        line_chart(
            title,
            [
                Series(name, [(p.step, p.value) for p in scalars[tag]], color)
                for tag, name, color in curves
                if scalars.get(tag)
            ],
            placed,
            axis,
            last,
        )
        for title, axis, curves in _CHARTS
    ]
    drawn = [chart for chart in drawn if chart]
    if not drawn or not stage.trains:
        return Markup("")
    return joined([element("h3", "Curves"), element("div", *drawn, class_="charts"), marks_legend(stage.entries)])


def _first_images(stage: StageContent, problems: list[str]) -> list[Markup]:
    images = stage.recorded.images.get("train/images", [])
    if not images:
        return []
    try:
        shown = picture(images[-1][1], "augmented training images")
    except ValueError as error:
        problems.append(f"the first training images cannot be shown: {error}")
        return []
    note = "The first micro-batch as the model saw it: cropped, augmented and mixed."
    return [
        element("h3", "Training images"),
        element("p", note, class_="soft"),
        element("div", shown, class_="picture"),
    ]
