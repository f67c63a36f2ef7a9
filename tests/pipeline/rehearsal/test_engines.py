"""Engines on fake tensors and the arithmetic of partitions, held against real ranks of DeepSpeed and their checkpoints."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from models.registry import create_model
from pipeline.checkpoints.checkpoint import Checkpoint, open_checkpoint
from pipeline.checkpoints.manifest import MANIFEST, FragmentEntry, Manifest, rank_name
from pipeline.errors import ConfigError, RunFailed
from pipeline.rehearsal.checkpoint_layout import CheckpointLayout, buffer_layout, kinds_of
from pipeline.rehearsal.engine_on_fake_tensors import BuiltRank, FakeEngineCase
from pipeline.rehearsal.fake_ranks import build_ranks, check_built
from pipeline.rehearsal.partitions import ModelParameters, Partitioning
from pipeline.rehearsal.reshape import SavedState
from tests.pipeline.rehearsal.saving_worker import CLASSES, stage_of
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow(seconds=30)

RANKS = 3
SAVED = ["0-fp32", "1-bf16", "2-fp32", "3-bf16"]
UNEVEN = ["1-fp32", "2-bf16", "3-bf16_autocast"]
# Of so many ranks the last has only padding of the group without weight decay.
MANY = 200
BUILT: list[tuple[str, int, tuple[int, ...]]] = [
    ("0-fp32", RANKS, (2,)), ("1-bf16", RANKS, (0, 2)), ("2-fp32", RANKS, (1,)), ("3-bf16", RANKS, (2,)),
]  # fmt: skip
BUILT += [*((case, 7, (6,)) for case in UNEVEN), ("1-bf16", MANY, (MANY - 1,))]
WORKER = Path(__file__).with_name("saving_worker.py")


def layout_of(case: str, ranks: int) -> CheckpointLayout:
    """By arithmetic."""
    stage = stage_of(case, ranks)
    model = create_model("coatnet_debug", num_classes=CLASSES, image_size=32, device="meta")
    average = stage.ema_decay is not None
    return CheckpointLayout(
        Partitioning(ModelParameters.of(model), stage.zero_stage, ranks),
        buffer_layout(model, moving_average=average),
        kinds_of(moving_average=average),
        ("a", "b", "c"),
    )


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint of real ranks."""

    folder: Path

    @property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.folder / "checkpoints/step-00000001")

    @property
    def manifest(self) -> Manifest:
        return self.checkpoint.manifest

    @property
    def files(self) -> dict[str, int]:
        return {file.name: file.stat().st_size for file in Path(self.checkpoint.location).iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(RANKS, WORKER, folder, *SAVED)
    return {case: Saved(folder / case) for case in SAVED}


@pytest.fixture(scope="module")
def built() -> dict[tuple[str, int], tuple[BuiltRank, ...]]:
    cases = [
        FakeEngineCase(stage_of(case, ranks).model_dump(mode="json"), CLASSES, ranks, which)
        for case, ranks, which in BUILT
    ]
    found = build_ranks(cases)
    return {(case, ranks): engines for (case, ranks, _), engines in zip(BUILT, found, strict=True)}


@pytest.mark.parametrize("case", SAVED)
def test_an_engine_on_fake_tensors_saves_what_a_real_rank_saved(
    saved: dict[str, Saved], built: dict[tuple[str, int], tuple[BuiltRank, ...]], case: str
) -> None:
    fragments, files = saved[case].manifest.fragments_by_file(), saved[case].files
    for engine in built[case, RANKS]:
        own = f"{rank_name(engine.rank)}.safetensors"
        assert dict(engine.files) == {name: files[name] for name in engine.files}
        assert engine.files.keys() == {own} | ({"buffers.safetensors"} if engine.rank == 0 else set())
        parts = [part for part in engine.ranges if part.saved_here]
        assert [FragmentEntry(p.parameter, p.start, p.stop, own) for p in parts] == fragments[own]


@pytest.mark.parametrize("case", SAVED)
def test_an_engine_on_fake_tensors_holds_what_a_real_rank_holds(
    saved: dict[str, Saved], built: dict[tuple[str, int], tuple[BuiltRank, ...]], case: str
) -> None:
    for engine in built[case, RANKS]:
        held = json.loads((saved[case].folder / f"held-{engine.rank}.json").read_text())
        assert {"masters": engine.masters, "weights": engine.weight_bytes} == held


@pytest.mark.parametrize("case", SAVED)
def test_the_arithmetic_has_every_file_of_a_real_checkpoint_to_the_byte(saved: dict[str, Saved], case: str) -> None:
    layout, manifest = layout_of(case, RANKS), saved[case].manifest
    files = layout.files()
    expected = [*files, layout.manifest_file(manifest.facts, files)]
    assert {file.name: file.bytes for file in expected} == saved[case].files
    assert sum(file.fragments for file in files) == expected[-1].fragments == len(manifest.fragments)
    assert [file.name for file in expected][-1] == MANIFEST


@pytest.mark.parametrize(("case", "ranks", "which"), BUILT)
def test_the_arithmetic_has_what_engines_hold_on_even_and_uneven_worlds(
    built: dict[tuple[str, int], tuple[BuiltRank, ...]], case: str, ranks: int, which: tuple[int, ...]
) -> None:
    engines = built[case, ranks]
    assert tuple(engine.rank for engine in engines) == which
    for engine in engines:
        check_built(engine, layout_of(case, ranks), stage_of(case, ranks).precision)


@pytest.mark.parametrize(
    "changes", [{"masters": 1}, {"weight_bytes": 1}, {"ranges": ()}, {"files": {"rank-00006.safetensors": 1}}]
)
def test_an_engine_that_is_partitioned_otherwise_is_an_error(
    built: dict[tuple[str, int], tuple[BuiltRank, ...]], changes: dict[str, object]
) -> None:
    (engine,) = built["2-bf16", 7]
    with pytest.raises(RunFailed, match="the engine of rank 6.* is partitioned otherwise than this program knows"):
        check_built(replace(engine, **changes), layout_of("2-bf16", 7), "bf16")  # type: ignore[arg-type]


def test_what_an_engine_asks_of_others_is_counted(built: dict[tuple[str, int], tuple[BuiltRank, ...]]) -> None:
    parameters = len(layout_of("2-bf16", 7).partitioning.parameters.shapes)
    assert built["2-bf16", 7][0].collectives == {"broadcast": parameters}
    assert built["3-bf16_autocast", 7][0].collectives["allgather_base"] == parameters


class Reads:
    """What a checkpoint reads: files, pieces and bytes."""

    def __init__(self, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files: set[str] = set()
        self.opened = 0
        local = Checkpoint._opened

        def opened(of: Checkpoint, name: str) -> object:
            self.files.add(name)
            self.opened += 1
            return local(of, name)

        monkeypatch.setattr(Checkpoint, "_opened", opened)


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("ranks", [2, 7])
def test_a_reshape_has_the_files_and_bytes_that_ranks_of_another_world_really_read(
    saved: dict[str, Saved], case: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = saved[case].checkpoint
    partitioning = layout_of(case, ranks).partitioning
    reshape = SavedState.of_manifest("it", checkpoint.manifest).reshaped(partitioning, range(ranks), None)
    for rank in range(ranks):
        reads = Reads(checkpoint, monkeypatch)
        found = [
            checkpoint.read(part.parameter, kind, part.start, part.stop)
            for part in partitioning.ranges(rank)
            for kind in checkpoint.manifest.kinds
        ]
        pieces = reads.opened
        checkpoint.buffers()
        reading = reshape.ranks[rank]
        assert set(reading.files) == reads.files
        assert reading.state_bytes == sum(tensor.nbytes for tensor in found)
        assert reading.pieces * len(checkpoint.manifest.kinds) == pieces
        monkeypatch.undo()
    assert sum(reading.hashed_bytes for reading in reshape.ranks) == reshape.checkpoint_bytes
    assert reshape.checkpoint_bytes == checkpoint.manifest.total_bytes


@pytest.mark.parametrize("case", SAVED)
def test_a_made_up_checkpoint_is_read_like_a_real_one(saved: dict[str, Saved], case: str) -> None:
    layout, target = layout_of(case, RANKS), layout_of(case, 5).partitioning
    made_up = SavedState.of_layout(layout, layout.files()).reshaped(target, range(5), None)
    real = SavedState.of_manifest("it", saved[case].manifest).reshaped(target, range(5), None)
    assert made_up == replace(real, source="of 3 ranks", made_up=True)


def test_a_checkpoint_of_another_model_is_refused(saved: dict[str, Saved]) -> None:
    model = create_model("coatnet_debug", num_classes=CLASSES + 1, image_size=32, device="meta")
    other = Partitioning(ModelParameters.of(model), 2, 2)
    with pytest.raises(ConfigError, match=r"another model: head.classifier.bias has 3 elements there and 4 in this"):
        SavedState.of_manifest("it", saved["2-fp32"].manifest).reshaped(other, (0,), None)


def test_an_element_that_is_in_no_file_is_an_error(saved: dict[str, Saved]) -> None:
    state = SavedState.of_manifest("it", saved["3-bf16"].manifest)
    name = next(name for name, starts in state.starts.items() if len(starts) == RANKS)
    for number in (0, 1):
        broken = replace(
            state,
            starts={**state.starts, name: [s + (n == number) for n, s in enumerate(state.starts[name])]},
        )
        with pytest.raises(RunFailed, match=f"of {name}, which rank 0 of 2 reads, are not once in its files"):
            broken.reshaped(layout_of("3-bf16", 2).partitioning, (0,), None)


def test_an_engine_that_cannot_be_built_is_an_error_with_the_reason() -> None:
    stage = stage_of("2-fp32", 2).model_dump(mode="json") | {"resolution": 33}
    with pytest.raises(RunFailed, match=r"cannot be built on tensors without memory: rank 1: ValueError: .*33"):
        build_ranks([FakeEngineCase(stage, CLASSES, 2, (1,))])
