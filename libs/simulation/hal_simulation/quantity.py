"""The interval around a modelled figure."""

from __future__ import annotations

from hal_core.plugin_api import Basis, Provenance, Quantity

#: How far a modelled figure may be off, relative to it, by the worst provenance of what it is made of.
RELATIVE_UNCERTAINTY = {
    Provenance.MEASURED_SILICON: 0.1,
    Provenance.VENDOR_PUBLISHED: 0.25,
    Provenance.PAPER_PROJECTION: 0.25,
    Provenance.ASSUMED: 0.5,
}


def modelled(middle: float, provenance: Provenance, source: str, uncertainty: float | None = None) -> Quantity:
    """The interval middle * (1 - uncertainty) to middle * (1 + uncertainty), with basis "modelled".

    Args:
        middle: what the model says, in SI units.
        provenance: the worst of the figures that the model used. source: the model, for people.
        uncertainty: relative, 0 to 1; None for that of the provenance, `RELATIVE_UNCERTAINTY`.
    """
    spread = RELATIVE_UNCERTAINTY[provenance] if uncertainty is None else uncertainty
    return Quantity(middle * (1 - spread), middle * (1 + spread), Basis.MODELLED, provenance, source)
