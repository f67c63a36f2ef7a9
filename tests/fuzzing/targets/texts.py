"""What people and their programs write: recipes, label maps, class lists, files with labels."""

import random
from collections.abc import Callable
from pathlib import Path

import yaml

from data.classes.class_lists import read_class_list, read_classes
from data.classes.label_files import read_label_file
from data.classes.labels import read_label_map
from data.remote.storage import Storage
from jobs.bundled_recipes import bundled_recipes, load_recipe
from jobs.frozen_recipe import frozen_recipe, recipe_text
from jobs.run_discovery import find_runs
from pipeline.recipe.loader import load_recipe as read_recipe
from tests.fuzzing.campaign import Fuzz, SilentAcceptance, Target
from tests.fuzzing.mutation import ODD_VALUES, damaged_bytes, damaged_json, damaged_value

_CLASSES = ("bright", "dark", "striped")
_LABEL_MAP = "rename: {bright: light, dark: night}\nothers: keep\nclasses: [light, night, striped]\n"
_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(9 * [f'*{chr(97 + n)}'])}]\n" for n in range(12)
)
_CLASS_LISTS = {
    "list.txt": ("bright\ndark\nstriped\n", "0 bright\n1 dark\n2 striped\n", "n01440764\tbright\nn01443537\tdark\n", "bright, 0\ndark, 1\n"),
    "list.json": ('["bright", "dark"]', '{"0": "bright", "1": "dark"}', '{"0": ["n01", "a"], "1": ["n02", "b"]}', '{"a": 0, "b": 1}'),
}  # fmt: skip
_LABEL_FILES = {
    "labels.txt": ("0.jpg 1\n1.jpg 2\n", "1\n2\n", "a.jpg\t1 2\n"),
    "labels.csv": ('name,label\n"0.jpg",1\n1.jpg,dark\n', "0.jpg,1,2\n"),
    "labels.tsv": ("name\tlabel\n0.jpg\t1\n",),
}


def _text(rng: random.Random, seed: str) -> bytes:
    """Damaged text: of its bytes, or its lines in another order, or with very long ones."""
    kind = rng.randrange(8)
    if kind == 0:
        lines = seed.splitlines(keepends=True) or [""]
        return "".join(rng.choices(lines, k=rng.choice((1, 3, 20)))).encode()
    if kind == 1:
        unit = rng.choice(
            (" ", "a ", "0 ", "\t", ",", ", ", "é", "0", "a\t", "{", "[", '"', "- ", "\n", "a\n", "0:", "_")
        )
        return (seed + unit * rng.choice((100, 3000, 20_000))).encode()
    return damaged_bytes(rng, seed.encode())


def _label_map(folder: Path) -> Fuzz:
    path = folder / "map.yaml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        found = read_label_map(path, _CLASSES)
        kept = {target for target in found.targets.tolist() if target >= 0}
        if not kept or max(kept) >= len(found.classes) or len(set(found.classes)) < len(found.classes):
            raise SilentAcceptance("a label map to classes that do not exist")
        if any(not name.strip() for name in found.classes):
            raise SilentAcceptance("a class without a name")

    return Fuzz(lambda rng: _text(rng, rng.choice((*20 * [_LABEL_MAP], _BOMB))), read)


def _class_list(folder: Path) -> Fuzz:
    def mutate(rng: random.Random) -> bytes:
        name = rng.choice(list(_CLASS_LISTS))
        return name.encode() + b"\0" + _text(rng, rng.choice(_CLASS_LISTS[name]))

    def read(content: bytes) -> None:
        name, _, text = content.partition(b"\0")
        path = folder / name.decode()
        path.write_bytes(text)
        found = read_class_list(str(path), Storage())
        if not found.names or not all(name.strip() for name in found.names):
            raise SilentAcceptance("a class without a name")
        found.by_number()
        read_classes(str(path), Storage())

    return Fuzz(mutate, read)


def _label_file(folder: Path) -> Fuzz:
    def mutate(rng: random.Random) -> bytes:
        name = rng.choice(list(_LABEL_FILES))
        return name.encode() + b"\0" + _text(rng, rng.choice(_LABEL_FILES[name]))

    def read(content: bytes) -> None:
        name, _, text = content.partition(b"\0")
        path = folder / name.decode()
        path.write_bytes(text)
        found = read_label_file(str(path), Storage())
        found.assign(["0.jpg", "1.jpg"])

    return Fuzz(mutate, read)


def _recipe(load: Callable[[Path], object]) -> Callable[[Path], Fuzz]:
    def prepare(folder: Path) -> Fuzz:
        (folder / "recipes").mkdir()
        path = folder / "recipes" / "r.yaml"
        seeds = [
            file.read_text()
            for name, file in bundled_recipes().items()
            if "in1k" in name or name in ("demo", "own_images")
        ]
        values = [yaml.safe_load(seed) for seed in seeds]

        def mutate(rng: random.Random) -> bytes:
            if rng.randrange(2):
                return _text(rng, rng.choice((*5 * seeds, _BOMB)))
            if rng.randrange(3):
                return damaged_json(rng, rng.choice(values))
            value = damaged_value(rng, rng.choice(values))
            return yaml.safe_dump(value).encode(errors="surrogatepass")

        def read(content: bytes) -> None:
            path.write_bytes(content)
            load(path)

        return Fuzz(mutate, read)

    return prepare


def _loaded(path: Path) -> None:
    recipe = read_recipe(path)
    frozen = frozen_recipe(recipe)
    again = path.with_name("again.yaml")
    again.write_text(recipe_text(frozen.recipe))
    if read_recipe(again) != frozen.recipe:
        raise SilentAcceptance("a frozen recipe is read as another one")


def _overridden(folder: Path) -> Fuzz:
    (folder / "r.yaml").write_text(bundled_recipes()["demo"].read_text())
    keys = (
        "stages",
        "pretrain",
        "optimizer.peak_learning_rate",
        "seed",
        "name",
        "data.train",
        "model",
        "steps",
        "a.b",
        "",
        "defaults",
    )

    def mutate(rng: random.Random) -> bytes:
        return f"{rng.choice(keys)}=".encode() + _text(
            rng, str(rng.choice(ODD_VALUES)).encode(errors="replace").decode()
        )

    def read(content: bytes) -> None:
        read_recipe(folder / "r.yaml", [content.decode(errors="surrogateescape")])

    return Fuzz(mutate, read)


def _frozen(path: Path) -> None:
    """As the recipe of a run that was submitted, and under the name of its digest."""
    digest = path.with_name(f"{'0' * 16}.yaml")
    digest.write_bytes(path.read_bytes())
    run = path.parents[1] / "run"
    (run / "slurm").mkdir(parents=True, exist_ok=True)
    (run / "slurm" / "recipe.yaml").write_bytes(path.read_bytes())
    for one in find_runs(run):
        one.stages()
    load_recipe(digest)


TARGETS = [
    Target("label-map", _label_map),
    Target("class-list", _class_list),
    Target("label-file", _label_file),
    Target("recipe", _recipe(_loaded)),
    Target("override", _overridden),
    Target("frozen-recipe", _recipe(_frozen)),
]
