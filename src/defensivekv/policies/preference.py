"""What a layer asks for, measured beside its scores."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from defensivekv.types import Importance


@runtime_checkable
class Preference(Protocol):
    """A number for each layer; the higher, the more of the budget it asks for."""

    def measure(self, importance: Importance) -> Float[Tensor, " m"]:
        """Of some heads; what is measured adds up over heads."""
        ...

    def finish(self, measured: Float[Tensor, " m"]) -> float:
        """Of the whole layer."""
        ...


@dataclass(frozen=True)
class DispersionAndShift:
    """`H^(1/tau1) * V^(1/tau2)` (CAKE, arXiv 2503.12491, section 4.1; constants as in the DefensiveKV authors' runs).

    `H` is the entropy of the window's attention, summed over queries and heads; `V` its variance over the window's
    queries, summed over entries and heads.
    """

    tau1: float = 1.6
    tau2: float = 0.6

    def measure(self, importance: Importance) -> Float[Tensor, " m"]:
        result = importance.new_zeros(2)
        result[0] = -(importance * (importance + 1e-10).log()).sum()
        if importance.shape[2] > 1:
            result[1] = importance.var(2).sum()
        return result

    def finish(self, measured: Float[Tensor, " m"]) -> float:
        dispersion, shift = measured.clamp_min(0).tolist()
        return float(dispersion ** (1 / self.tau1) * shift ** (1 / self.tau2))
