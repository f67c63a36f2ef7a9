"""What Inductor makes one kernel of, as a rule."""

from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import replace

from pipeline.planner.trace.operations import FUSABLE, Access, Operation


def fuse(operations: Sequence[Operation], used_later: Container[int] = ()) -> list[Operation]:
    """The kernels of the compiled `operations`, which are those of one graph in their order.

    `used_later` has the values that are read after the graph, as by a backward; values that nothing reads are results.

    The rule: matrix products, convolutions and attention are library calls that read and write their tensors. So do
    sums over rows, such as BatchNorm's statistics, for what uses their result. Between such calls, everything that is
    connected is one kernel, which reads what it needs once and writes what is used elsewhere once; LayerNorm and
    softmax, whose rows fit into a kernel, are a part of it. A kernel that comes later reads a cast from its source and
    repeats the cast; one that nothing else reads is not stored.
    """
    operations = _used(_through_casts(operations), used_later)
    depth: dict[int, int] = {}
    depths = []
    for operation in operations:
        here = max((depth.get(access.value, 0) for access in operation.reads), default=0)
        barrier = operation.kind not in FUSABLE or operation.crosses_rows
        for access in operation.writes:
            depth[access.value] = here + barrier
        depths.append(here)
    groups = _connected(operations, depths)
    readers: dict[int, set[int]] = defaultdict(set)
    writers = {access.value: groups[n] for n, operation in enumerate(operations) for access in operation.writes}
    for number, operation in enumerate(operations):
        for access in operation.reads:
            readers[access.value].add(groups[number])
    members: dict[int, list[Operation]] = defaultdict(list)
    for number, operation in enumerate(operations):
        members[groups[number]].append(operation)
    return [_kernel(found, group, readers, writers, used_later) for group, found in members.items()]


def _kernel(
    members: list[Operation],
    group: int,
    readers: dict[int, set[int]],
    writers: dict[int, int],
    used_later: Container[int],
) -> Operation:
    first = members[0]
    if len(members) == 1 and first.kind not in FUSABLE:
        return first
    reads: dict[int, int] = {}
    writes: dict[int, int] = {}
    for operation in members:
        for access in operation.reads:
            if writers.get(access.value) != group:
                reads[access.value] = max(access.bytes, reads.get(access.value, 0))
        for access in operation.writes:
            if readers.get(access.value, set()) != {group} or access.value in used_later:
                writes[access.value] = max(access.bytes, writes.get(access.value, 0))
    kind = max(members, key=lambda operation: operation.bytes).kind
    return replace(
        first,
        kind=kind if len(members) == 1 else "elementwise",
        name="+".join(dict.fromkeys(operation.name for operation in members)),
        reads=tuple(Access(value, size) for value, size in reads.items()),
        writes=tuple(Access(value, size) for value, size in writes.items()),
        strided=any(operation.strided for operation in members),
    )


def _through_casts(operations: Sequence[Operation]) -> list[Operation]:
    """The same operations, of which those with kernels of their own read the source of a cast instead of its result."""
    source: dict[int, Access] = {}
    found = []
    for operation in operations:
        if operation.kind in FUSABLE:
            reads = tuple(source.get(access.value, access) for access in operation.reads)
            operation = replace(operation, reads=reads)
        if operation.is_cast:
            source[operation.writes[0].value] = operation.reads[0]
        found.append(operation)
    return found


def _used(operations: Sequence[Operation], used_later: Container[int]) -> list[Operation]:
    """Without casts that nothing reads any more."""
    read = {access.value for operation in operations for access in operation.reads}
    return [o for o in operations if not o.is_cast or any(a.value in read or a.value in used_later for a in o.writes)]


def _connected(operations: Sequence[Operation], depths: Sequence[int]) -> list[int]:
    """For each operation the number of its kernel."""
    groups = list(range(len(operations)))

    def find(number: int) -> int:
        while groups[number] != number:
            groups[number] = groups[groups[number]]
            number = groups[number]
        return number

    made_by: dict[int, int] = {}
    for number, operation in enumerate(operations):
        if operation.kind in FUSABLE:
            for access in operation.reads:
                maker = made_by.get(access.value)
                if maker is not None and depths[maker] == depths[number]:
                    groups[find(number)] = find(maker)
            for access in operation.writes:
                made_by[access.value] = number
    return [find(number) for number in range(len(operations))]
