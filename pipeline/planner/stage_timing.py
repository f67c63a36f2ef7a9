"""The timing of a planned stage as failures see it."""

from data.remote.storage import is_remote
from pipeline.planner.failures.run_timing import RunTiming, save_cost, start_seconds
from pipeline.planner.hardware import Cluster
from pipeline.planner.step_estimate import parameters_of
from pipeline.recipe.schema import TrainStage
from pipeline.state_bytes import checkpoint_bytes


def stage_timing(
    stage: TrainStage,
    classes: int,
    shards: int,
    cluster: Cluster,
    step: float,
    interval: int,
    *,
    remote: bool | None = None,
) -> RunTiming:
    """Steps, saves and starts of `stage` on `cluster`.

    Args:
        stage: as in the recipe.
        classes: of its data.
        shards: of its data.
        cluster: where it runs.
        step: seconds of a step.
        interval: steps between saves.
        remote: whether shards and checkpoints are in an object store; None for what the recipe says of each.
    """
    parameters = parameters_of(stage, classes)
    size = checkpoint_bytes(stage, parameters)
    saves = is_remote(stage.checkpoint.folder or "") if remote is None else remote
    reads = is_remote(stage.data.train or "") if remote is None else remote
    return RunTiming(
        nodes=cluster.nodes,
        ranks_per_node=cluster.gpus_per_node,
        batch=stage.batch.global_size,
        step=step,
        interval=interval,
        save=save_cost(size, cluster.gpus, cluster.gpus_per_node, remote=saves),
        start=start_seconds(
            size,
            cluster.gpus,
            cluster.gpus_per_node,
            parameters=parameters,
            shards=shards,
            compiled=stage.compile,
            remote=reads,
        ),
        watchdog=stage.watchdog,
        grace=stage.checkpoint.grace_seconds,
    )
