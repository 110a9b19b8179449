"""A stage of a study, the machine it would run on, and the hours and bytes it takes there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mmhooks.errors import MMHooksError
from mmhooks.models.cost import Cost

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """Peaks of an accelerator, from its data sheet.

    Attributes:
        flops: FLOP/s of matrix products by type. PyTorch multiplies fp32 without TF32 unless it is told otherwise.
        bandwidth: bytes/s of its memory.
        memory: bytes.
    """

    name: str
    flops: dict[str, float]
    bandwidth: float
    memory: float

    def peak(self, dtype: str) -> float:
        """Returns the FLOP/s of a type.

        Raises:
            MMHooksError: its peak is not known.
        """
        if dtype not in self.flops:
            raise MMHooksError(
                f"{self.name}: expected one of {', '.join(self.flops)}, got {dtype!r}; give --dtype one of these"
            )
        return self.flops[dtype]


_A100 = {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12}
MACHINES = {
    "a100-80gb": Machine("A100 80 GB", _A100, 2.039e12, 80 * GB),
    "a100-40gb": Machine("A100 40 GB", _A100, 1.555e12, 40 * GB),
}


@dataclass(frozen=True)
class Assumption:
    """What an estimate assumes of a run on a machine.

    Attributes:
        utilisation: share of the peaks, of arithmetic and of memory alike, that is reached; hours are given for ``low``
            and ``high`` as well.
        launch: seconds that the host needs for one operator.
    """

    utilisation: float = 0.35
    low: float = 0.2
    high: float = 0.5
    launch: float = 8e-6

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.utilisation <= self.high <= 1:
            raise MMHooksError(
                f"expected 0 < --low <= --utilisation <= --high <= 1, got {self.low}, {self.utilisation} and {self.high}"
            )
        if self.launch < 0:
            raise MMHooksError(f"--launch: expected at least 0, got {self.launch}")

    def at(self, utilisation: float) -> Assumption:
        """Returns the same at another utilisation."""
        return replace(self, utilisation=utilisation, low=utilisation, high=utilisation)


@dataclass(frozen=True)
class Stage:
    """Calls of one kind.

    Attributes:
        count: images, texts, answers, … that go through the model; ``unit`` names them.
        batch: of them at a time. repeat: calls that each batch needs, such as denoising steps or new tokens.
        cost: of one call with a whole batch.
        dtype: in which it computes.
        disk: bytes that the stage writes.
    """

    name: str
    unit: str
    count: int
    cost: Cost
    batch: int
    repeat: int = 1
    dtype: str = "float32"
    disk: int = 0

    @property
    def calls(self) -> int:
        """Calls of the model."""
        return math.ceil(self.count / self.batch) * self.repeat

    @property
    def flops(self) -> float:
        """FLOPs of the whole stage; the last batch counts by its share."""
        return self.cost.flops * self.repeat * self.count / self.batch

    def times(self, machine: Machine, assumed: Assumption) -> dict[str, float]:
        """Returns the seconds that each limit alone would take: arithmetic and reading weights at a share of the
        machine's peaks, and launching one kernel an operator, which a host does one after the other."""
        return {
            "arithmetic": self.flops / machine.peak(self.dtype) / assumed.utilisation,
            "memory": self.cost.traffic * self.calls / machine.bandwidth / assumed.utilisation,
            "launches": self.cost.operators * self.calls * assumed.launch,
        }

    def seconds(self, machine: Machine, assumed: Assumption) -> float:
        """Returns the longest of :meth:`times`."""
        return max(self.times(machine, assumed).values())

    def bound(self, machine: Machine, assumed: Assumption) -> str:
        """Returns which of :meth:`times` is the longest."""
        times = self.times(machine, assumed)
        return max(times, key=times.__getitem__)
