"""What a replay is of: the stage that a command names, its steps and samples, and how many ranks recompute it here."""

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from data.sample_reader import SampleReader
from jobs.frozen_recipe import FOLDER as RECIPES
from jobs.run_discovery import RunRef, check_stages, find_run
from pipeline.errors import ConfigError
from pipeline.host import this_host
from pipeline.plan import TrainPlan
from pipeline.recipe.schema import TrainStage
from pipeline.replay.branch_run import is_unfinished_branch
from pipeline.replay.logged_steps import RunStart, run_starts, starts_of_steps
from pipeline.runs.run_folder import RunFolder

_MARKER = ".replay"
_NAME = re.compile(r"[\w.\-]+")


def stage_folder(target: Path, stage: str | None) -> RunFolder:
    """The run folder of the training stage that a command names: `stage`, or the only one that has started.

    Raises:
        ConfigError: there is none, or there are several.
    """
    run = find_run(target)
    if stage is not None:
        check_stages([run], [stage])
        return run.folder(stage)
    training = _training_stages(run)
    if not training:
        raise ConfigError(f"{run.path}: no training stage has started here")
    if len(training) > 1:
        raise ConfigError(f"{run.path}: several training stages have started; name one of them: {', '.join(training)}")
    return run.folder(training[0])


def _training_stages(run: RunRef) -> list[str]:
    frozen = {name: run.folder(name).frozen() for name in run.stages()}
    return [name for name, found in frozen.items() if found is not None and found.task == "train"]


def run_beside(folder: RunFolder, name: str) -> Path:
    """The folder of another run beside the one of a stage; what an interrupted replay left there is removed.

    Raises:
        ConfigError: the name cannot be that of a run, or is taken.
    """
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise ConfigError(f"--as {name}: the name of a run has letters, digits, dots, dashes and underscores")
    path = folder.path.parent.parent / name
    if path.exists() and not (path / RECIPES / f"{name}.yaml").exists() and is_unfinished_branch(path, folder):
        shutil.rmtree(path)
    if path.exists():
        raise ConfigError(f"--as {name}: {path} exists already; give the branch another name")
    return path


def ranks_here(stage: TrainStage, folder: RunFolder, first: int, until: int, wanted: int | None) -> int:
    """How many ranks recompute the steps after `first` up to `until` on this machine.

    As many as the run had, if this machine has as many GPUs or, for a run on CPUs, processors; otherwise the most that
    share the micro-batches evenly.

    Raises:
        ConfigError: those that are `wanted` do not share them evenly.
    """
    micro_batches = stage.batch.micro_batches
    if wanted is not None:
        if micro_batches % wanted:
            divisors = [str(count) for count in range(1, micro_batches + 1) if micro_batches % count == 0]
            raise ConfigError(
                f"--ranks {wanted}: does not divide the {micro_batches} micro-batches of a step; use one of "
                f"{', '.join(divisors)}"
            )
        return wanted
    past = starts_of_steps(run_starts(folder.events.entries()), first, until)
    before = past[-1].ranks if past else stage.resources.ranks
    most = min(before, _places(stage, past))
    return max(count for count in range(1, most + 1) if micro_batches % count == 0)


def _places(stage: TrainStage, past: Sequence[RunStart]) -> int:
    """Ranks that this machine can run at full speed."""
    if stage.resources.gpus_per_rank:
        from pipeline.ranks.gpus import visible_gpus  # torch

        if gpus := visible_gpus():
            return gpus
    return max(1, this_host().cores // stage.resources.threads_per_rank)


def named_samples(plan: TrainPlan, names: Sequence[str], first: int, until: int) -> tuple[str, ...]:
    """The samples that `names` mean, as `shard/key`; a key alone is looked up in the steps after `first` up to `until`.

    Raises:
        ConfigError: none of these steps has such a key.
        DataError, StorageDown: shards that cannot be read.
    """
    shards = {shard.name for shard in plan.train.index.shards}
    alone = {name for name in names if not _begins_with_one_of(name, shards)}
    found: dict[str, str] = {}
    if alone:
        with closing(SampleReader(plan.train, plan.cache)) as reader:
            for step in range(first, until):
                order = plan.at(step).order
                samples = order.at(step, 0, order.batch)
                reader.request(sorted(set(samples.shard.tolist())))
                for shard, place in zip(samples.shard.tolist(), samples.place.tolist(), strict=True):
                    key = reader.key(shard, place)
                    if key in alone:
                        found.setdefault(key, f"{plan.train.index.shards[shard].name}/{key}")
                if len(found) == len(alone):
                    break
    for name in names:
        if name in alone and name not in found:
            raise ConfigError(
                f"--without {name}: none of the steps {first + 1:,} to {until:,} has a sample with this key; write "
                "shard/key for one of a later step"
            )
    return tuple(found.get(name, name) for name in names)


def _begins_with_one_of(name: str, shards: set[str]) -> bool:
    parts = name.split("/")
    return any("/".join(parts[:count]) in shards for count in range(1, len(parts)))


def folder_of_ranks(out: Path | None, ranks: int | None) -> Path:
    """In a rank: the folder for its results, as `--out` says.

    Raises:
        ConfigError: it was started by hand, without the folder or with another number of ranks than `--ranks`.
    """
    if out is None:
        raise ConfigError("--out is missing: ranks that are started by hand need the same folder for their results")
    if ranks is not None and ranks != int(os.environ["WORLD_SIZE"]):
        raise ConfigError(f"--ranks {ranks}: this process is one of {os.environ['WORLD_SIZE']} ranks; leave it out")
    return out


def prepared_output(folder: Path) -> Path:
    """An empty folder for results, in place of those of an earlier call.

    Raises:
        ConfigError: there is something else, or it cannot be written.
    """
    try:
        if folder.exists():
            if os.listdir(folder) and not (folder / _MARKER).exists():
                raise ConfigError(f"--out {folder}: holds something else than a replay; name an empty folder")
            shutil.rmtree(folder)
        (folder / "logs").mkdir(parents=True)
        (folder / _MARKER).touch()
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}; name a folder that you can write") from None
    return folder
