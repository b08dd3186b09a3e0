"""The functional level of the optics against a float32 product and against two published simulators, interleaved in one
run.

aihwkit 1.1.0 (pip install --no-deps aihwkit==1.1.0) and CrossSim 3.2.0 (from source) take part where they can be
imported; their readout codes are compared with ours as well.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import time
from collections.abc import Callable

import record
import torch
from hal_photonics.simulator import published_simulators
from hal_photonics.simulator.blockfloat import product
from hal_photonics.simulator.converters import Converters

SIZE, ROUNDS = 1024, 15
CHIP = Converters(10, 7, 11, 1.86, 128)
OURS = "ours, functional level"


def contestants() -> dict[str, Callable[[], object]]:
    """Products of SIZE^3 by name: the same converters, a scale by row and tile, tiles 128 deep."""
    x, w = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    found: dict[str, Callable[[], object]] = {
        "float32 product": lambda: x @ w.T,
        OURS: lambda: product(x[None], w[None], CHIP),
    }
    if importlib.util.find_spec("aihwkit") is not None:
        from aihwkit.nn import AnalogLinearMapped
        from aihwkit.simulator.parameters.enums import NoiseManagementType

        config = published_simulators.aihwkit_configuration(CHIP, CHIP.inputs)
        config.forward.noise_management = NoiseManagementType.ABS_MAX
        config.mapping.max_input_size = config.mapping.max_output_size = CHIP.inputs
        layer = AnalogLinearMapped(SIZE, SIZE, bias=False, rpu_config=config)

        def by_aihwkit() -> torch.Tensor:
            with torch.no_grad():
                result: torch.Tensor = layer(x)
                return result

        found["aihwkit 1.1.0, AnalogLinearMapped, torch tiles of 128 x 128"] = by_aihwkit
    return found


def interleaved(calls: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Processor seconds of each call on one thread, in random order each round, two rounds of warming up."""
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 2):
        for name in random.sample(list(calls), len(calls)):
            start = time.process_time()
            calls[name]()
            if round_ >= 2:
                times[name].append(time.process_time() - start)
    return times


def equal_codes() -> list[str]:
    """One sentence for each simulator that is here: the share of readout codes equal to ours."""
    x = (torch.rand(1024, 128) * 2 - 1).mul(CHIP.input_levels).round() / CHIP.input_levels
    w = (torch.rand(128, 128) * 2 - 1).mul(CHIP.weight_levels).round() / CHIP.weight_levels
    x[:, 0], w[:, 0] = 1, 1
    ours = (product(x[None], w[None], CHIP)[0][0] / (CHIP.lsb(128) / CHIP.gain)).round()
    said = []
    for name, module, codes in (
        ("aihwkit", "aihwkit", published_simulators.aihwkit_codes),
        ("CrossSim", "simulator", published_simulators.crosssim_codes),
    ):
        if importlib.util.find_spec(module) is None:
            said.append(f"{name} is not installed here: not compared.")
            continue
        same = ours == codes(x, w, CHIP)
        counts = f"{int(same.sum()):,} of {same.numel():,} readout codes"
        said.append(f"{name}: {counts} at 10/7/11 bits, G = 1.86, 128 x 128 equal ours.")
    return said


def main() -> None:
    options = record.parser(__doc__).parse_args()
    times = interleaved(contestants())
    ours = times[OURS]
    rows = []
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, ours, strict=True))
        bar = ">= 0.125" if name.startswith("float32") else ">= 5" if name.startswith("aihwkit") else ""
        rows.append([name, f"{statistics.median(values) * 1e3:.1f}", f"{min(values) * 1e3:.1f}", f"{ratio:.3f}", bar])
    title = f"Products of {SIZE}^3 at the functional level"
    columns = ["what", "median ms", "least ms", "time over ours, median of rounds", "bar"]
    notes = [
        *equal_codes(),
        "They sum fractions in float32, we whole numbers: a sum within its rounding of a tie may go either way.",
        "Processor time of one thread: other work on the machine then does not count.",
        "Ours quantises both operands in the call; aihwkit's weights are in its tiles before. Its C++ tiles do not run "
        "with this torch (built for another one). Three ways were tried for the bar of 5 against its torch tiles: "
        "float32 products of whole tiles (1.8), by blocks of rows that stay in the cache (2.3), and eight-bit integer "
        "products by such blocks, the ones timed here.",
    ]
    record.publish(options, "photonics_functional", title, columns, rows, notes)


if __name__ == "__main__":
    main()
