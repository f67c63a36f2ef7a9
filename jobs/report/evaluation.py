"""Evaluations in the report: the one at the end of a stage, and those of `coatnet evaluate`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data.files.regular_file import read_regular
from data.text.counted import counted
from jobs.report.charts import calibration_chart
from jobs.report.markup import Markup, element, facts, folded, joined, picture, table
from pipeline.runs.evaluation_report import CONFUSION_PICTURE, MISTAKES_PICTURE, EvaluationReport
from pipeline.runs.evaluation_summary import summary_rows
from pipeline.runs.stage_result import ClassAccuracy, StageResult

_SHOWN = 12
"""Classes of the best and of the worst; a few more than twice as many are all shown."""
_MOST_CLASSES = 1000
_MOST_PAIRS = 15
_PICTURE_BYTES = 2**26


def final_evaluation(result: StageResult, sigmoid: bool) -> Markup:
    """The evaluation at the end of a stage."""
    figures, best = result.validation, "precision@1" if sigmoid else "top-1"
    weights = "moving average" if result.weights == "ema" else "raw weights"
    rows = [
        (best, f"{figures.top1:.2%}"),
        ("top-5", f"{figures.top5:.2%}"),
        ("loss", f"{figures.loss:.4f}"),
        ("images", f"{figures.samples:,}"),
        ("images that could not be used", f"{figures.skipped:,}"),
        ("evaluated", f"{weights} after step {result.steps:,}"),
        ("checkpoint", result.checkpoint),
    ]
    return joined([element("h3", "Final evaluation"), facts(rows), class_tables(result.classes, best)])


def class_tables(classes: Mapping[str, ClassAccuracy], best: str) -> Markup:
    """Accuracies of the classes: of many, the worst and the best, and all of them on demand."""
    found = sorted(((c.top1, name, c) for name, c in classes.items() if c.top1 is not None), key=lambda row: row[:2])
    absent = len(classes) - len(found)
    remark = f" {counted(absent, 'class has', 'classes have')} no images." if absent else ""
    headings = ("class", "images", best, "top-5")
    rows = [
        (name, f"{row.samples:,}", _bar(share), "" if row.top5 is None else f"{row.top5:.1%}")
        for share, name, row in found
    ]
    if not rows:
        return element("p", "There are no figures by class.", remark, class_="soft")
    right = ("images", "top-5")
    if len(rows) <= 2 * _SHOWN + 6:
        return joined(
            [
                element("h3", "Classes, worst first"),
                element("p", remark),
                element("div", table(headings, rows, right), class_="narrow"),
            ]
        )
    parts: list[Markup] = [
        element("div", element("h3", f"The {_SHOWN} worst classes"), table(headings, rows[:_SHOWN], right)),
        element("div", element("h3", f"The {_SHOWN} best classes"), table(headings, rows[: -_SHOWN - 1 : -1], right)),
    ]
    if len(rows) <= _MOST_CLASSES:
        every = folded(f"All {len(rows):,} classes, worst first", table(headings, rows, right))
    else:
        every = element("p", f"All {len(rows):,} classes are in result.json of the stage.", class_="soft")
    return joined([element("div", *parts, class_="columns"), element("p", remark), every])


def reported_evaluation(folder: Path, report: EvaluationReport, missing: list[str]) -> Markup:
    """An evaluation of `coatnet evaluate`; pictures that cannot be shown are added to `missing`."""
    names = {name: row.display_name for name, row in report.classes.items() if row.display_name}

    def shown(name: str) -> str:
        return f"{names[name]} ({name})" if name in names else name

    parts: list[Markup] = [element("h3", f"Evaluation: {folder.name}"), facts(summary_rows(report))]
    pairs = [
        (shown(pair.true), shown(pair.predicted), f"{pair.samples:,}", f"{pair.share:.1%}")
        for pair in report.confused[:_MOST_PAIRS]
    ]
    columns = [calibration_chart([(b.samples, b.confidence, b.accuracy) for b in report.calibration.bins])]
    if pairs:
        heads = ("class", "taken for", "images", "of the class")
        columns.append(
            element("div", element("h3", "Most confused classes"), table(heads, pairs, ("images", "of the class")))
        )
    parts.append(element("div", *columns, class_="columns"))
    classes = {shown(name): ClassAccuracy(row.samples, row.top1, row.top5) for name, row in report.classes.items()}
    parts.append(folded("Figures by class", class_tables(classes, report.best_name)))
    for name, title, alt in (
        (CONFUSION_PICTURE, "Confusion matrix", "rows are the true classes, columns the predicted ones"),
        (MISTAKES_PICTURE, "Most confident mistakes", "images with their labels and predictions"),
    ):  # fmt: skip
        if name in report.files.values():
            parts += _picture(folder / name, title, alt, missing)
        elif name in report.left_out:
            missing.append(f"{folder.name}/{name}: {report.left_out[name]}")
    return joined(parts)


def _picture(path: Path, title: str, description: str, missing: list[str]) -> Sequence[Markup]:
    try:
        image = picture(read_regular(path, _PICTURE_BYTES), description)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        missing.append(f"{path.parent.name}/{path.name} cannot be shown: {reason}")
        return []
    return [element("h3", title), element("div", image, class_="picture")]


def _bar(share: float) -> Markup:
    return element(
        "span",
        element("span", element("i", style=f"width:{100 * share:.0f}%"), class_="bar"),
        f"{share:.1%}",
        class_="share-cell",
    )
