"""Latency and energy of attention on photonic devices over lengths, modelled, against a GPU's, measured in the same
run.

    python benchmarks/photonics_sweep.py --against cuda:0 --record

The record says for each device from which length it would be better, or that it never is; a picture lies beside it.
Against published figures (the default) it has a section of its own and no picture.
"""

from __future__ import annotations

import record
from hal_photonics.benchmark import draw, profile_named, sweep

import hal_core as hal


def main() -> None:
    options = record.parser(__doc__)
    options.add_argument("--against", default="published:h200", help="device id, or published:h200 (default)")
    options.add_argument("--lengths", default="512,2048,8192,32768", help="(default %(default)s)")
    options = options.parse_args()
    measured = not options.against.startswith("published:")
    lengths = [int(length) for length in options.lengths.split(",")]
    rows, notes = [], ["Batch 1, 32 heads, head size 128. Simulated devices: their time and energy are modelled."]
    for device in (device for device in hal.devices() if device.family == "photonic"):
        found = sweep(profile_named(device.id), lengths, options.against)
        for point in found.points:
            energy = point.other_energy
            rows.append(
                [
                    device.id,
                    found.profile.name,
                    f"{point.length:,}",
                    f"{point.photonic_time.middle * 1e3:.3g}",
                    f"{point.optics_time * 1e3:.3g}",
                    f"{point.other_time.middle * 1e3:.3g}",
                    f"{point.other_time.middle / point.photonic_time.middle:.3f}",
                    f"{point.photonic_energy.middle:.3g}",
                    "not available" if energy is None else f"{energy.middle:.3g}",
                    f"{point.photonic_time.basis}, {point.photonic_time.provenance}",
                    str(point.other_time.basis),
                ]
            )
        notes.append(f"{device.id}: {found.crossover('time')} {found.crossover('energy')}")
        if options.record and measured and device.id == "lightmatter:0":
            draw(found, record.FOLDER / "photonics_sweep.png")
    models = {device.id: f"{options.against}, {device.model}" for device in hal.devices()}
    title = f"Photonic attention against {models.get(options.against, options.against)}"
    columns = [
        "device",
        "profile",
        "length",
        "modelled ms",
        "optics alone, ms",
        f"{options.against} ms",
        "speed",
        "modelled J",
        f"{options.against} J",
        "origin",
        "origin of the other",
    ]
    section = "Sweep" if measured else f"Sweep against {options.against}"
    record.publish(options, "photonics_sweep", title, columns, rows, notes, section)


if __name__ == "__main__":
    main()
