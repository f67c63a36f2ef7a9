"""Whether the batches of a training stage mix as many classes as those of shuffled shards."""

from data.classes.class_mixing import dataset_labels, mixing_advice
from data.errors import DataError, StorageDown
from data.text.counted import counted
from pipeline.plan import TrainPlan
from pipeline.preflight.finding import Finding


def lanes_in_use(plan: TrainPlan) -> str:
    """The number of lanes, and whether it was chosen."""
    return counted(plan.order.lanes, "lane") + ("" if plan.stage.data.lanes else " (derived from the batch)")


def assess_mixing(plan: TrainPlan) -> Finding:
    """An estimate from the labels of the index and the order of the plan; it names the lanes in use."""
    data, order = plan.stage.data, plan.order
    lanes = lanes_in_use(plan)
    if plan.train.index.labels_sha256 is None:
        unknown = "the index has no labels to estimate the classes of a batch from"
        return Finding("ok", plan.name, f"data.lanes: {lanes}; {unknown}")
    try:
        labels = dataset_labels(plan.train)
    except (DataError, StorageDown) as error:
        return Finding("warning", plan.name, f"data.train: with {lanes}, the classes of a batch are not known: {error}")
    if labels is None:
        return Finding(
            "ok", plan.name, f"data.lanes: {lanes}; there are too many labels to estimate the classes of a batch"
        )
    what, fix = mixing_advice(labels, order, plan.stage.batch.micro_size, data.train or "")
    if fix is None:
        return Finding("ok", plan.name, f"data.lanes: {lanes}; {what}")
    return Finding("warning", plan.name, f"data.train: the samples are sorted: with {lanes}, {what}", fix)
