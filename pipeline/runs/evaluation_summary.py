"""A report of an evaluation in a few lines for people."""

from data.text.counted import counted
from pipeline.runs.evaluation_report import ReportOverview


def summary_rows(report: ReportOverview) -> list[tuple[str, str]]:
    """Names and values: what was evaluated on what, and the figures over all classes."""
    model, data, figures, how = report.model, report.data, report.figures, report.computation
    kind = "moving average" if model.weights == "ema" else "raw weights"
    rows = [
        ("model", f"{model.name}, {kind} after step {model.step:,}, {model.location}"),
        ("shards", data.shards + (f", label map {data.label_map}" if data.label_map else "")),
        ("images", f"{figures.samples:,}{_not_counted(report)}"),
        ("view", f"{how.image_size} pixels, crop {how.crop}, {how.precision}, {how.batch_size} at a time"),
        ("classes", _classes(report)),
        (report.best_name, f"{figures.top1:.2%}"),
        ("top-5", f"{figures.top5:.2%}"),
    ]
    if report.average_precision:
        average = report.average_precision
        rows.append(
            ("mean average precision", f"{average.mean:.2%} over {counted(average.classes, 'class', 'classes')}")
        )
    bins = len(report.calibration.bins)
    return [
        *rows,
        ("loss", f"{figures.loss:.4f}"),
        ("calibration error", f"{report.calibration.error:.4f} (expected, {bins} bins of confidence)"),
    ]


def _not_counted(report: ReportOverview) -> str:
    parts = []
    if report.figures.skipped:
        parts.append(f"{report.figures.skipped:,} more cannot be used")
    if report.data.left_out:
        parts.append(f"{report.data.left_out:,} left out by label map or index")
    return f" ({'; '.join(parts)})" if parts else ""


def _classes(report: ReportOverview) -> str:
    absent = report.data.classes_without_samples
    return f"{report.model.classes:,}" + (f", {absent:,} of them without samples" if absent else "")
