"""SCALE-Sim's side of kpu_simulators.py, run by a Python that has it (numpy 1.26.4, numba 0.61.2, pandas 2.2.3).

python kpu_scalesim.py M N K ROWS COLS DATAFLOW -> JSON: total cycles as it prints them, seconds of its run
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

CONFIG = """[general]
run_name = gemm
[architecture_presets]
ArrayHeight = {rows}
ArrayWidth = {cols}
IfmapSramSzkB = 1024
FilterSramSzkB = 1024
OfmapSramSzkB = 1024
IfmapOffset = 0
FilterOffset = 10000000
OfmapOffset = 20000000
Dataflow = {dataflow}
Bandwidth = 64
ReadRequestBuffer = 512
WriteRequestBuffer = 512
[layout]
IfmapCustomLayout = False
IfmapSRAMBankBandwidth = 10
IfmapSRAMBankNum = 10
IfmapSRAMBankPort = 2
FilterCustomLayout = False
FilterSRAMBankBandwidth = 10
FilterSRAMBankNum = 10
FilterSRAMBankPort = 2
[sparsity]
SparsitySupport = false
SparseRep = ellpack_block
OptimizedMapping = false
BlockSize = 8
RandomNumberGeneratorSeed = 40
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
"""


def main() -> None:
    from scalesim.scale_sim import scalesim

    M, N, K, rows, cols = (int(word) for word in sys.argv[1:6])
    with tempfile.TemporaryDirectory() as folder:
        config, topology, layout = (Path(folder) / name for name in ("gemm.cfg", "gemm.csv", "layout.csv"))
        config.write_text(CONFIG.format(rows=rows, cols=cols, dataflow=sys.argv[6]))
        topology.write_text(f"Layer,M,N,K,Sparsity,\ngemm,{M},{N},{K},1:1,\n")
        layout.write_text("Layer," + ",".join(f"c{i}" for i in range(20)) + ",\ngemm," + ",".join(["1"] * 20) + ",\n")
        said = io.StringIO()
        begun = time.perf_counter()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            simulator = scalesim(
                save_disk_space=True,
                verbose=True,
                config=str(config),
                topology=str(topology),
                layout=str(layout),
                input_type_gemm=True,
            )
            simulator.run_scale(top_path=folder)
        seconds = time.perf_counter() - begun
        report = next(Path(folder).rglob("COMPUTE_REPORT.csv")).read_text().splitlines()
    names, values = ([cell.strip() for cell in line.split(",")] for line in report[:2])
    cycles = float(values[names.index("Total Cycles")])
    print(json.dumps({"cycles": int(cycles), "seconds": seconds, "report": dict(zip(names, values, strict=False))}))


if __name__ == "__main__":
    main()
