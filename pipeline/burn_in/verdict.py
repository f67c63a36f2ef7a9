"""Which devices compute wrong values, judged from the bits of all of them; nothing is computed here."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from data.text.counted import counted


@dataclass(frozen=True, slots=True)
class DeviceBits:
    """What a device computed, again and again from the same inputs."""

    where: str
    """Which device it is of those that are compared, such as `rank 3 on node2`."""
    node: str
    name: str
    """As torch names a GPU; the model of a CPU."""
    uuid: str
    """Of a GPU, as nvidia-smi prints it; empty if it is not known."""
    kind: str
    """Devices of one kind compute equal bits: the name, and what else decides which kernels run."""
    bits: Mapping[str, int]
    """The results, each with the number of repetitions that had it: fingerprints with their names, `loss=0123 ...`."""
    seconds: float
    """That the repetitions took."""
    problem: str | None = None
    """Why nothing was computed."""

    @property
    def repetitions(self) -> int:
        """How often the micro-batch was computed."""
        return sum(self.bits.values())

    @property
    def usual(self) -> str:
        """The result of most repetitions."""
        return max(self.bits, key=lambda result: self.bits[result])

    @property
    def text(self) -> str:
        """Where it is, and what."""
        return f"{self.where} ({', '.join(filter(None, (self.name, self.uuid)))})"


@dataclass(frozen=True, slots=True)
class Suspect:
    """A device that computes wrong values, or may be the one that does."""

    device: DeviceBits
    reason: Literal["itself", "others", "undecided"]
    """It differs from itself; always, from most others of its kind; from others without a majority among them."""
    wrong: int
    """Repetitions whose bits are not those of most."""
    others: int
    """Devices with which it was compared."""
    values: tuple[str, ...]
    """The names of those that differ."""

    @property
    def text(self) -> str:
        """Which device it is, and what is wrong."""
        values = f"in {', '.join(self.values)}"
        if self.reason == "itself":
            of = f"{self.wrong:,} of {self.device.repetitions:,} repetitions"
            return f"{self.device.text} computed other bits than itself in {of}, {values}"
        kind = f"{counted(self.others, 'other')} of its kind"
        if self.reason == "others":
            return f"{self.device.text} always computes other bits than most of {kind}, {values}"
        return f"{self.device.text} computes other bits than {kind}, {values}, and no majority says which are right"


def suspects(devices: Sequence[DeviceBits]) -> tuple[Suspect, ...]:
    """The devices that are wrong or may be, in their order.

    A device that differs from itself is wrong. The others of a kind have one voice each; those outside of a majority
    are wrong, and without one nobody knows.
    """
    found: dict[int, Suspect] = {}
    for number, device in enumerate(devices):
        if len(device.bits) > 1:
            usual = device.usual
            names = _differing(usual, *device.bits)
            found[number] = Suspect(device, "itself", device.repetitions - device.bits[usual], 0, names)
    for kind in dict.fromkeys(device.kind for device in devices):
        voices = {n: one.usual for n, one in enumerate(devices) if one.kind == kind and len(one.bits) == 1}
        counts = Counter(voices.values())
        if len(counts) < 2:
            continue
        ((most, voters),) = counts.most_common(1)
        decided = 2 * voters > len(voices)
        for number, bits in voices.items():
            if not decided or bits != most:
                against = [most] if decided else [other for other in counts if other != bits]
                repeated = devices[number].repetitions
                reason: Literal["others", "undecided"] = "others" if decided else "undecided"
                others = len(voices) - 1
                found[number] = Suspect(devices[number], reason, repeated, others, _differing(bits, *against))
    return tuple(found[number] for number in sorted(found))


def _differing(result: str, *others: str) -> tuple[str, ...]:
    """The names of the fingerprints of `result` that are not the same in all of `others`."""
    values = [dict(part.partition("=")[::2] for part in one.split()) for one in (result, *others)]
    return tuple(name for name in values[0] if len({one[name] for one in values}) > 1)
