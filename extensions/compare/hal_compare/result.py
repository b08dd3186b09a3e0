"""What a comparison found, as data: figures with their origin, rows, and the whole."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import attrs

from hal_core import Basis, Device, Provenance, Quantity

HOST_CLOCK = "this host's clock"


@attrs.frozen
class Figure:
    """A number with its spread and its origin.

    Attributes:
        middle: the median over repeats, or the middle of an interval. low, high: lowest and highest.
        basis, provenance, source: see `hal_core.Quantity`.
    """

    middle: float
    low: float
    high: float
    basis: Basis
    provenance: Provenance
    source: str = ""

    @classmethod
    def over(
        cls,
        values: Sequence[float],
        basis: Basis = Basis.MEASURED,
        provenance: Provenance = Provenance.MEASURED_SILICON,
        source: str = HOST_CLOCK,
    ) -> Figure:
        """The median and the range of repeated values."""
        return cls(statistics.median(values), min(values), max(values), basis, provenance, source)

    @classmethod
    def of(cls, quantity: Quantity) -> Figure:
        """A device's own figure."""
        return cls(quantity.middle, quantity.low, quantity.high, quantity.basis, quantity.provenance, quantity.source)

    def plus(self, other: Figure) -> Figure:
        """The sum, with the worse basis and provenance of the two."""
        basis = max(self.basis, other.basis, key=lambda b: b.rank)
        provenance = max(self.provenance, other.provenance, key=lambda p: p.rank)
        source = self.source if self.source == other.source else f"{self.source}; {other.source}"
        return Figure(
            self.middle + other.middle, self.low + other.low, self.high + other.high, basis, provenance, source
        )

    @property
    def origin(self) -> str:
        """ "measured", or the basis with its provenance."""
        return str(self.basis) if self.basis is Basis.MEASURED else f"{self.basis}, {self.provenance}"


@attrs.frozen(kw_only=True)
class Accuracy:
    """How far a row's results are from the float64 run.

    Attributes:
        worst, mean: over texts, of ||h - reference|| / ||reference||, h the last hidden states of a text's real tokens.
        cosine, cosine_mean: lowest and mean over texts, between the text's vector and the reference's: the embedding,
            or for a causal model the last token's hidden state.
        layers: the mean error over texts after the embeddings and after each layer, median over repeats.
        agreement: share of texts with the reference's nearest neighbour, or of positions with its next token.
        decisions: how many texts or positions that is.
        perplexity, reference_perplexity: of the text under a causal model; None for an embedding model.
    """

    worst: Figure
    mean: Figure
    cosine: Figure
    cosine_mean: Figure
    layers: tuple[float, ...]
    agreement: Figure
    decisions: int
    perplexity: Figure | None = None
    reference_perplexity: float | None = None


@attrs.frozen(kw_only=True)
class Costs:
    """Seconds, joules and work of one pass over the text.

    Attributes:
        wall: the whole model, by the host's clock. inside: inside the row's part of it, attention where nothing else is
            said. remainder: wall - inside, which the host does. For a simulated device wall and inside are the
            simulation's time, not the device's.
        on_device: what the device needs for its part; `inside` itself for a device that is not modelled.
        total: remainder + on_device.
        energy: of the device's share; None where it states none. The host's energy is never known here: no meter.
        macs: dense multiply-accumulates of what ran on the device: pairs that a mask or a block plan hides are counted,
            so that all rows have the same work. calls: attention calls.
    """

    wall: Figure
    inside: Figure
    remainder: Figure
    on_device: Figure
    total: Figure
    energy: Figure | None
    macs: int
    calls: int


@attrs.frozen(kw_only=True)
class Layer:
    """One layer of the model, or a part of one, as a row ran it.

    Attributes:
        name: of the module. error: mean over texts of ||x - reference|| / ||reference||, x the layer's output in the
            row, and so with the errors of all layers before it.
        time, energy: of what ran on the device in it, in one pass; None where nothing did, and where the device states
            no energy. time_share, energy_share: of the device's part of the whole model.
        macs: multiply-accumulates on the device.
    """

    name: str
    error: Figure
    time: Figure | None = None
    time_share: float | None = None
    energy: Figure | None = None
    energy_share: float | None = None
    macs: int = 0


@attrs.frozen(kw_only=True)
class Row:
    """One device's part of a comparison.

    Attributes:
        name: device id, with a mark where it runs more than attention, or "torch sdpa". device: None for the baseline
            and for a device that is not there.
        place: torch device of the tensors. baseline: whether this is torch's own attention.
        scope: which part of the model runs on the device.
        refusals: reasons, as sentences; empty where it ran. refused_batches: how many of the batches it refused.
        repeats: timed runs, and draws of a noisy device's noise; one where more would have taken too long.
        accuracy, costs: None where it was refused.
        groups: costs by text file. layers: empty where they were not asked for, or cannot be told apart.
    """

    name: str
    device: Device | None
    place: str
    baseline: bool = False
    scope: str = "attention"
    refusals: tuple[str, ...] = ()
    refused_batches: int = 0
    repeats: int = 0
    accuracy: Accuracy | None = None
    costs: Costs | None = None
    groups: dict[str, Costs] = attrs.field(factory=dict)
    layers: tuple[Layer, ...] = ()

    @property
    def ran(self) -> bool:
        return self.accuracy is not None

    @property
    def fidelity(self) -> str:
        if self.device is None:
            return "hardware" if self.baseline else "absent"
        return str(self.device.fidelity)


@attrs.frozen(kw_only=True)
class Group:
    """One text file as it was run: sizes in tokens, multiply-accumulates of the whole model and of attention."""

    name: str
    sha256: str
    texts: int
    tokens: int
    longest: int
    cut: int
    macs: int
    attention_macs: int


@attrs.frozen(kw_only=True)
class Comparison:
    """A whole comparison.

    Attributes:
        command, created: how and when (UTC). versions, machine: what ran it. model: facts of the model.
        groups: the text files. batches, batch_size, repeats: how it was run.
        rows: the baseline and the devices. assumed_power: watts that the user assumed for rows without a meter; None
            where no energy is assumed.
    """

    command: str
    created: str
    versions: dict[str, str]
    machine: dict[str, str]
    model: dict[str, Any]
    groups: tuple[Group, ...]
    batches: int
    batch_size: int
    repeats: int
    rows: tuple[Row, ...]
    assumed_power: float | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the model over all text, padding included."""
        return sum(group.macs for group in self.groups)

    @property
    def tokens(self) -> int:
        return sum(group.tokens for group in self.groups)

    def share(self, row: Row) -> float:
        """The part of the model's multiply-accumulates that ran on the row's device."""
        return row.costs.macs / self.macs if row.costs else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no NaN and no infinity: they are None."""
        plain: dict[str, Any] = attrs.asdict(self, value_serializer=_plain)
        for row, values in zip(self.rows, plain["rows"], strict=True):
            values |= {"fidelity": row.fidelity, "ran": row.ran, "macs_share": self.share(row) if row.ran else None}
        return {"format": 1, **plain, "macs": self.macs, "tokens": self.tokens}


def _plain(_: Any, __: Any, value: Any) -> Any:
    if isinstance(value, (Basis, Provenance)) or hasattr(value, "rank"):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return sorted(value) if isinstance(value, frozenset) else value
