"""Names of classes for people, from a file such as ImageNet's list of synsets and their words."""

from data.classes.class_lists import read_class_list
from data.errors import DataError
from data.remote.storage import Storage


def read_display_names(location: str, classes: tuple[str, ...] | None, count: int, storage: Storage) -> tuple[str, ...]:
    """Names for people of `count` classes, in the order of the classes.

    The lines of the file are `n01440764 tench, Tinca tinca`, or any id, a tab and a name: they are for the classes of
    these ids, in any order, and there may be more of them. Lines without ids are for the classes in their order. So are
    lines with ids if the names of the classes are not known.

    Args:
        location: path or URL of the file, of a form that `read_class_list` reads.
        classes: names of the classes; None if they are not known.
        count: number of classes.
        storage: how to access it.

    Raises:
        DataError: not such a file, classes without a line, another number of lines, or the names of `classes`
            themselves in another order.
        StorageRefused, StorageDown: access refused, or no answer.
    """
    found = read_class_list(location, storage)
    if classes is not None and found.ids is not None:
        by_id = dict(zip(found.ids, found.names, strict=True))
        missing = [name for name in classes if name not in by_id]
        if not missing:
            return tuple(by_id[name] for name in classes)
        if len(missing) < len(classes) or len(found.names) != count:
            raise DataError(
                f"{location}: no name for {len(missing):,} of the {count:,} classes (first: {missing[0]}); its lines "
                f"need the names of the classes as ids, such as {found.ids[0]}"
            )
    if len(found.names) != count:
        raise DataError(
            f"{location}: {len(found.names):,} names for {count:,} classes; it needs one line per class, in the order "
            "of the classes, or lines of ID NAME"
        )
    if classes is not None and found.names != classes and set(found.names) == set(classes):
        raise DataError(f"{location}: the names of the classes in another order; write lines of CLASS<TAB>NAME")
    return found.names
