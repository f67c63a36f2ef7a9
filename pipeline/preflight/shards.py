"""Whether the shards of a stage exist, can be read from here, and fit each other, the model and the cache."""

import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data.dataset import Dataset
from data.errors import DataError
from data.images.decode import DecodeError, decode
from data.index import FILE_NAME, ShardIndex, check_shards
from data.limits import IMAGE_BYTES
from data.remote.remote_file import open_file
from data.remote.storage import Storage, is_remote
from data.shard import split_key
from data.tarfile_limits import open_limited
from data.text.counted import counted
from pipeline.built_shards import check_built
from pipeline.checkpoints.lost import check_final_checkpoint
from pipeline.plan import (
    Plan,
    TrainPlan,
    check_cache_size,
    open_stage_dataset,
    required_cache_bytes,
    stage_cache,
    train_plan,
)
from pipeline.preflight.class_mixing import assess_mixing
from pipeline.preflight.disk_space import gigabytes
from pipeline.preflight.finding import Finding, Findings
from pipeline.recipe.schema import Recipe, TrainStage
from pipeline.runs.extension import extension
from pipeline.runs.run_folder import run_folder, start_digest

Part = Literal["train", "validation"]


@dataclass
class ShardAssessor:
    """Assesses the shards of the stages of `recipe`, those that several stages share only once."""

    recipe: Recipe
    extend: bool = False
    """Whether stages that have begun with other settings are to go on with these."""
    extended: set[str] = field(default_factory=set)
    """Those that would be, of the stages assessed so far."""
    _problems: dict[tuple[str, str], str | None] = field(default_factory=dict)
    """By folder and digest of an index, what is wrong with its samples."""

    def assess(self, name: str) -> tuple[Findings, Plan | None]:
        """The findings, and the plan of the stage; None if its data are wrong or have yet to be built."""
        found, stage = Findings(name), self.recipe.stages[name]
        training = isinstance(stage, TrainStage)
        datasets = {part: self._dataset(name, part, found) for part in parts_of(training)}
        validation, train = datasets["validation"], datasets.get("train")
        plan: Plan | None = None
        if validation is not None and not training:
            plan = Plan(name, self.recipe.seed, stage, validation, stage_cache(stage))
        elif validation is not None and train is not None:
            with found.capture():
                change = extension(self.recipe, name) if self.extend else None
                plan = change.plan if change else train_plan(self.recipe, name, train, validation)
                if change:
                    self.extended.add(name)
                    for line in change.lines:
                        found.ok(f"{change.folder.path}: {line}")
        if plan is not None:
            with found.capture():
                self._assess_cache(plan, found)
            with found.capture():
                self._assess_run_folder(plan, found)
            if isinstance(plan, TrainPlan):
                with found.capture():
                    found.append(assess_mixing(plan))
        return found, plan

    def _dataset(self, name: str, part: Part, found: Findings) -> Dataset | None:
        stage = self.recipe.stages[name]
        folder = stage.data.train if part == "train" else stage.data.validation
        assert folder is not None
        if self._is_built_by_the_chain(folder):
            assert self.recipe.shards is not None
            found.ok(f"data.{part}: the chain builds the shards first, from {self.recipe.shards.source}")
            return None
        with found.capture():
            dataset = open_stage_dataset(stage, part, "")
            check_shards(dataset.index, dataset.storage)
            key = (dataset.index.folder, dataset.index.digest)
            if key not in self._problems:
                self._problems[key] = unreadable(dataset.index, dataset.storage)
            problem = self._problems[key]
            if problem:
                found.warning(
                    f"data.{part}: {problem}", f"check the rest with: coatnet shards verify {folder} --decode"
                )
            found.ok(
                f"data.{part}: {counted(dataset.samples, 'sample')} of "
                f"{counted(len(dataset.classes), 'class', 'classes')} in "
                f"{counted(len(dataset.index.shards), 'shard')}, {gigabytes(dataset.index.bytes)}"
            )
            if part == "train" and not dataset.index.images_decode:
                found.append(
                    Finding(
                        "ok",
                        name,
                        "data.train: its images were not decoded when it was indexed, so that training decodes whole "
                        "pictures, not their crops alone",
                        f"to have it faster: coatnet shards index {folder} --decode --overwrite, with its options",
                    )
                )
            return dataset
        return None

    def _is_built_by_the_chain(self, folder: str) -> bool:
        shards = self.recipe.shards
        return (
            shards is not None
            and not is_remote(folder)
            and Path(folder).is_relative_to(shards.folder)
            and not (Path(folder) / FILE_NAME).exists()
        )

    def _assess_cache(self, plan: Plan, found: Findings) -> None:
        training = plan if isinstance(plan, TrainPlan) else None
        need = required_cache_bytes(plan.stage, plan.stage.resources.ranks, plan.validation, training)
        check_cache_size(plan.cache, need, "")
        if need:
            found.ok(
                f"data.cache.gigabytes: {plan.cache.bytes / 1e9:g}, and a node reads {need / 1e9:.1f} GB at a time"
            )

    def _assess_run_folder(self, plan: Plan, found: Findings) -> None:
        folder = run_folder(self.recipe, plan.name)
        if plan.name in self.extended:
            return
        folder.check(plan, start_digest(self.recipe, plan.name, to_compare=True))
        if folder.result() is not None:
            remark = check_final_checkpoint(self.recipe, plan.name)
            found.ok(f"{folder.path}: done{'; ' if remark else ''}{remark}")
        elif folder.events.entries():
            found.ok(f"{folder.path}: continues a run with these settings")


def parts_of(training: bool) -> tuple[Part, ...]:
    """Which parts of its data a stage reads."""
    return ("train", "validation") if training else ("validation",)


def assess_source(recipe: Recipe) -> list[Finding]:
    """Whether the shards of the recipe can be built, or, if they exist, were built as the recipe says."""
    shards = recipe.shards
    if shards is None:
        return []
    if Path(shards.folder).exists():
        found = Findings("shards")
        with found.capture():
            doubt = check_built(shards)
            if doubt:
                found.warning(*doubt.split("; ", 1))
            else:
                found.ok(f"{shards.folder} was built from {shards.source} with the settings of the recipe")
        return found
    if is_remote(shards.source) or Path(shards.source).exists():
        return [Finding("ok", "shards", f"will be built from {shards.source} into {shards.folder}")]
    return [Finding("error", "shards", f"shards.source: {shards.source}: no such file or folder", "correct it")]


def unreadable(index: ShardIndex, storage: Storage) -> str | None:
    """What is wrong with the first samples of the first and the last shard; None if nothing is.

    Raises:
        DataError: a shard cannot be read at all.
        StorageDown: the storage does not answer.
    """
    filled = [number for number, shard in enumerate(index.shards) if shard.samples]
    for number in dict.fromkeys(filled[:1] + filled[-1:]):
        location = index.location(number)
        try:
            with open_file(location, storage) as file, open_limited(file) as tar:
                for member in tar:
                    content = tar.extractfile(member) if _is_image(member.name, index.image_fields) else None
                    if content is not None:
                        decode(content.read(IMAGE_BYTES))
                        break
        except DecodeError as error:
            return f"shard {location}: its first image, {member.name}, does not decode ({error})"
        except (OSError, tarfile.TarError) as error:
            raise DataError(f"shard {location}: cannot be read ({error}); copy it again or fix its rights") from None
    return None


def _is_image(member: str, image_fields: tuple[str, ...]) -> bool:
    """Whether a member has an extension of images, behind the first dot of its name or, as in `a_0.5.jpg`, the last."""
    split = split_key(member)
    return split is not None and not {split[1], split[1].rpartition(".")[2]}.isdisjoint(image_fields)
