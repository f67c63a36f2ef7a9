"""From paths in a source to classes: one rule for folders, tars of folders, and tars of class tars.

An image belongs to the folder that contains it, and all class folders lie side by side. A class tar counts as a folder
of its name without extension. Trees that can be read in another way as well are refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property

from data.accounting import Accounting, listed
from data.building.formats import NotTaken, without_tar_extension
from data.errors import DataError
from data.files.hidden import is_hidden
from data.splits import SPLITS, name_words
from data.text.printable import one_line

BESIDE = "an image beside the class folders"

_PARTS = {
    *SPLITS, "images", "image", "imgs", "img", "jpegimages", "masks", "mask", "annotations", "labels", "extra",
    "unlabeled", "unlabelled",
}  # fmt: skip
"""Words of the names of folders that hold a whole dataset, or a part of one."""


@dataclass(frozen=True)
class Selection:
    """Which entries of a source are taken, and how its folders are read."""

    within: str | None = None
    """The folder of a tar to which everything is relative."""
    nested: bool = False
    """Images in subfolders belong to the folder at the top that contains them."""
    leave_out: tuple[str, ...] = ()
    """Patterns of entries that are not taken: of a file or folder name, or, with a slash, of a path."""

    def reason(self, path: str) -> str | None:
        """Why the entry at `path` is left out, if its path alone is enough for that."""
        if path.startswith(".") or "/." in path or "__MACOSX" in path:
            *folders, name = path.split("/")
            if any(is_hidden(folder) for folder in folders):
                return "in a hidden folder"
            if is_hidden(name):
                return "a hidden file"
        for pattern, expression in self._patterns:
            if any(expression.match(part) for part in _matched(path, "/" in pattern)):
                return option(pattern)
        return None

    @cached_property
    def _patterns(self) -> list[tuple[str, re.Pattern[str]]]:
        return [(pattern, re.compile(translate(pattern.strip("/")))) for pattern in self.leave_out]


def option(pattern: str) -> str:
    """The reason of what a pattern leaves out."""
    return f"--leave-out {pattern}"


def _matched(path: str, whole: bool) -> Iterator[str]:
    """The names along a path, or the path and the folders that contain it."""
    parts = path.split("/")
    yield from ("/".join(parts[:count]) for count in range(1, len(parts) + 1)) if whole else parts


@dataclass
class ClassFolders:
    """The folders that contain the images of a source.

    Args:
        location: of the source.
        selection: what is taken of it.
        is_tar: whether folders are selected with --within.
        flat: whether a label file has the classes, so that all images are in one folder.
        read_once: whether it is read while it is listed, so that `finish` would be late for refusing it.
    """

    location: str
    selection: Selection
    is_tar: bool
    flat: bool = False
    read_once: bool = False
    _names: dict[tuple[str, str], str] = field(default_factory=dict)
    _origins: dict[str, str] = field(default_factory=dict)
    """Class -> the tar that it is, or "" for a folder."""
    _first: str | None = None
    _strays: dict[str, None] = field(default_factory=dict)
    """Image folders that do not lie beside the first."""
    _folders: set[str] = field(default_factory=set)

    def add_folder(self, folder: str) -> None:
        """Note a folder, which may turn out to have no images."""
        while folder and folder not in self._folders and self.selection.reason(folder) is None:
            self._folders.add(folder)
            folder = folder.rpartition("/")[0]

    def class_of_tar(self, path: str) -> tuple[str, str]:
        """The class of the images in a class tar, and the prefix of their names.

        Raises:
            NotTaken: a label file has the classes.
            DataError: as for `class_of`.
        """
        if self.flat:
            raise NotTaken("a tar beside images with a label file")
        return self.class_of(without_tar_extension(path), path)

    def class_of(self, folder: str, tar: str = "") -> tuple[str, str]:
        """The class of the images in `folder`, and the prefix of their names.

        Raises:
            DataError: the class is both a folder and a tar; if the source is read once, also as for `finish`.
        """
        known = self._names.get((folder, tar))
        if known is None:
            known = self._names[folder, tar] = self._class_of(folder, tar)
        return known, f"{folder if self.selection.nested else known}/" if known else ""

    def _class_of(self, folder: str, tar: str) -> str:
        if self._first is None:
            self._first = folder
        if self.flat:
            if self._first != folder:
                raise DataError(
                    f"{self.location}: a label file is for images in one folder, and there are images in "
                    f"{_shown(self._first)} and in {_shown(folder)}; select one {self._by(folder)}, leave the others "
                    "out with --leave-out, or use a list of PATH<TAB>LABEL lines as the source"
                )
            return ""
        if self.selection.nested:
            name = folder.partition("/")[0]
        else:
            name = folder.rpartition("/")[2]
            if folder.rpartition("/")[0] != self._first.rpartition("/")[0]:
                self._strays[folder] = None
                if self.read_once:
                    self._refuse_strays()
                return name
        if self._origins.setdefault(name, tar) != tar:
            both = " and ".join(_shown(origin) if origin else "a folder" for origin in (self._origins[name], tar))
            raise DataError(
                f"{self.location}: class {one_line(name)} is there twice, as {both}; leave one of them out with "
                "--leave-out, as in --leave-out '*.tar' for the tars"
            )
        return name

    def _refuse_strays(self) -> None:
        """
        Raises:
            DataError: image folders do not lie side by side.
        """
        folders = {folder for folder, _ in self._names} | set(self._strays)
        nested = [(inner, outer) for inner in sorted(folders) for outer in _above(inner) if outer in folders]
        if nested:
            inner, outer = nested[0]
            names = {one.rpartition("/")[2] for one, _ in nested}
            pattern = names.pop() if len(names) == 1 else inner
            more = f", and in {len(nested) - 1:,} more subfolders of classes" if len(nested) > 1 else ""
            raise DataError(
                f"{self.location}: there are images in {_shown(outer)} and in its subfolder {_shown(inner)}{more}; to "
                f"take subfolders as part of the class above them, use --nested; to leave them out, --leave-out "
                f"{_quoted(pattern)}; if {_shown(outer)} contains the class folders, select them {self._by(outer)}"
            )
        first, stray = self._first or "", next(iter(self._strays))
        above = [folder.rpartition("/")[0] for folder in (first, stray)]
        name = first.rpartition("/")[2]
        same = next((one for one in self._strays if one.rpartition("/")[2] == name), None)
        if same is not None:
            above[1] = same.rpartition("/")[0]
            raise DataError(
                f"{self.location}: class folder {_shown(name)} is both in {_shown(above[0])} and in {_shown(above[1])}"
                f"; select one of them {self._by(above[1] or above[0])}"
            )
        tops = {folder.partition("/")[0] for folder in (first, stray)}
        more = (
            "" if tops & set(SPLITS) or len(tops) == 1 else ", or take the folders at the top as classes with --nested"
        )
        raise DataError(
            f"{self.location}: there are images in {_shown(first)} and in {_shown(stray)}, and class folders must lie "
            f"side by side; select those of one folder {self._by(above[1] or above[0])}, leave some out with "
            f"--leave-out{more}"
        )

    def _by(self, folder: str) -> str:
        if not self.is_tar:
            return f"by giving {self.location.rstrip('/')}/{one_line(folder)} as the source"
        inside = f"{self.selection.within.strip('/')}/{folder}" if self.selection.within else folder
        return f"with --within {_quoted(inside)}"

    def finish(self, accounting: Accounting) -> None:
        """Check the whole, and remark on folders without images.

        Raises:
            DataError: no images, image folders that do not lie side by side, or what look like datasets.
        """
        if self.flat:
            return
        if not self._origins:
            empty = sorted(self._folders)
            if BESIDE in accounting.left_out:
                raise DataError(
                    f"{self.location}: no class folders in it, only images; provide their labels with --labels FILE"
                )
            if empty:
                reasons = "; ".join(
                    f"{entries.count:,} left out: {reason}" for reason, entries in accounting.left_out.items()
                )
                raise DataError(
                    f"{self.location}: class folder {one_line(empty[0])} has no image"
                    f"{f' ({reasons})' if reasons else ''}; add images or remove it"
                )
            return
        if self._strays:
            self._refuse_strays()
        self._refuse_splits()
        first = self._first or ""
        above = "" if self.selection.nested else first.rpartition("/")[0]
        if self.selection.nested and len(self._origins) == 1:
            top = next(iter(self._origins))
            if any("/" in folder for folder, _ in self._names):
                raise DataError(
                    f"{self.location}: with --nested everything in it is of the one class {one_line(top)}; if that "
                    f"contains the class folders, select them {self._by(top)}"
                )
        if self.selection.nested and any("/" in folder for folder, _ in self._names):
            count = sum("/" in folder for folder, _ in self._names)
            accounting.remark(
                "nested", f"--nested: the images in {count:,} subfolders belong to the class of the folder at the top"
            )
        empty = sorted(
            folder
            for folder in self._folders
            if folder.rpartition("/")[0] == above and folder.rpartition("/")[2] not in self._origins
        )
        if empty:
            accounting.remark(
                "folders_without_images",
                f"{len(empty):,} folders beside the class folders have no image and are not classes "
                f"({listed([*map(_shown, empty)])}); if they are, give the class list with --classes",
            )

    def _refuse_splits(self) -> None:
        """Refuse training and validation sets that would become classes."""
        splits = {SPLITS[name.lower()]: name for name in self._origins if name.lower() in SPLITS}
        all_parts = all(set(re.split(r"[-_ .]+", name.lower())) <= _PARTS for name in self._origins)
        if all_parts and len(self._origins) == 1:
            name = next(iter(self._origins))
            raise DataError(
                f"{self.location}: all images are in {_shown(name)}, which does not look like a class; if a file has "
                f"their labels, select the folder {self._by(self._origins[name] or self._first or name)} "
                "together with --labels FILE; "
                "otherwise use a list of PATH<TAB>LABEL lines as the source"
            )
        if all_parts or len(splits) > 1:
            first, second = list(splits.values())[:2] if len(splits) > 1 else list(self._origins)[:2]
            raise DataError(
                f"{self.location}: {_shown(first)} and {_shown(second)} look like different datasets and not like "
                f"classes; select one {self._by(first)}, or use a list of PATH<TAB>LABEL lines as the source"
            )
        names: dict[str, str] = {}
        for origin in filter(None, self._origins.values()):
            for word in name_words(origin.rpartition("/")[2]):
                if word in SPLITS:
                    names.setdefault(SPLITS[word], origin)
        if len(names) > 1:
            first, second = list(names.values())[:2]
            raise DataError(
                f"{self.location}: the tars {_shown(first)} and {_shown(second)} look like parts of different datasets "
                "and not like classes; use one as the source, leave the others out with --leave-out, or index the "
                "shards of a WebDataset with: coatnet shards index"
            )


def _above(folder: str) -> Iterator[str]:
    """The folders that contain a folder, without the root."""
    while folder := folder.rpartition("/")[0]:
        yield folder


def _shown(folder: str) -> str:
    return one_line(folder) or "the top folder"


def _quoted(path: str) -> str:
    text = one_line(path)
    return f"'{text}'" if re.search(r"[^\w./@%+=:,-]", text) else text
