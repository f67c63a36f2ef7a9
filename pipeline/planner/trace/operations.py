"""Operations of a traced computation: what each computes, reads and writes. Needs no torch."""

from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal[
    "matmul",
    "attention",
    "convolution",
    "depthwise",
    "normalization",
    "elementwise",
    "reduction",
    "copy",
    "gather",
]
"""What limits an operation, and so how it is priced. `convolution` is one that is not depthwise."""

FUSABLE: frozenset[Kind] = frozenset({"normalization", "elementwise", "reduction", "copy", "gather"})
"""The kinds for which Inductor generates code, which can be one kernel with others. The rest are library calls."""


@dataclass(frozen=True, slots=True)
class Access:
    """A tensor that an operation reads or writes."""

    value: int
    """Number of what the storage holds at that moment; writing in place gives it a new one."""
    bytes: int
    """Of the elements that are accessed; one that is expanded counts once."""


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product as a kernel sees it, or a convolution as an implicit one: (M, K) times (K, N), `batch` times."""

    batch: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True, slots=True)
class Scores:
    """Attention of `queries` to `keys`, `heads` times (heads x images), with `head_size` channels each."""

    heads: int
    queries: int
    keys: int
    head_size: int
    products: int
    """Matrix products of that size: 2 in the forward, 5 in a backward, which recomputes the scores."""
    biased: bool
    """Whether a bias is added to the scores, which excludes flash attention."""

    @property
    def flops(self) -> int:
        """Multiplications and additions of the products."""
        return 2 * self.products * self.heads * self.queries * self.keys * self.head_size


@dataclass(frozen=True, slots=True)
class Taps:
    """A depthwise convolution: `outputs` elements, each the sum of `taps` products."""

    outputs: int
    taps: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.outputs * self.taps


@dataclass(frozen=True, slots=True)
class Operation:
    """One kernel, or several that belong together."""

    kind: Kind
    name: str
    """Of torch's operator; names joined with + for operations that are fused."""
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    work: Product | Scores | Taps | None = None
    in_float32: bool = False
    """Whether the arithmetic of `work` is in float32 rather than in half precision."""
    channels_last: bool = True
    """Layout of a convolution's tensors."""
    strided: bool = False
    """Whether a copy reads and writes in different orders, so that one of them is scattered."""
    crosses_rows: bool = False
    """Whether it must have seen the whole of a tensor before the first use of its result: sums over rows."""
    is_cast: bool = False
    """Whether it only converts a tensor to another dtype."""

    @property
    def flops(self) -> int:
        """Of matrix products, attention and convolutions; 0 for the rest."""
        return self.work.flops if self.work else 0

    @property
    def bytes_read(self) -> int:
        """Of all tensors that it reads."""
        return sum(access.bytes for access in self.reads)

    @property
    def bytes_written(self) -> int:
        """Of all tensors that it writes."""
        return sum(access.bytes for access in self.writes)

    @property
    def bytes(self) -> int:
        """Read and written."""
        return self.bytes_read + self.bytes_written

    def without_identity(self) -> "Operation":
        """The same without the numbers of its tensors, so that operations of one kind and size are equal."""
        return replace(self, reads=_anonymous(self.reads), writes=_anonymous(self.writes))


def _anonymous(accesses: tuple[Access, ...]) -> tuple[Access, ...]:
    return tuple(Access(0, size) for size in sorted(access.bytes for access in accesses))
