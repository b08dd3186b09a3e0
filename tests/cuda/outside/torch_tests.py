"""PyTorch's own attention tests, with PyTorch's kernels and with own kernels behind its operators.

    TORCH_TESTS=<folder `test` of a PyTorch checkout> python tests/cuda/outside/torch_tests.py

`make outside-tests` does the same. The checkout should be of the PyTorch that is installed. Both runs are printed, and
every failure that the original does not have; `--record` writes them to docs/benchmarks/outside_torch.md. The exit
code is 1 where there is such a failure.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORD = HERE.parents[2] / "docs" / "benchmarks" / "outside_torch.md"
#: Files of a checkout's test folder: the tests that are about attention ("" for all), and the most processes of use.
FILES = {
    "test_transformers.py": ("TestSDPA or TestAttnBias", 64),
    "test_varlen_attention.py": ("", 2),
    "nn/attention": ("", 1),
}


def shares(folder: Path, files: list[str], own: bool, options: argparse.Namespace, logs: Path) -> list[Any]:
    """Processes that run the files' tests between them. Their logs are <logs>/<own>/<file>-<share>.log."""
    started = []
    parts = [(file, share) for file in files for share in range(min(options.processes, FILES[file][1]))]
    for file, share in parts:
        log = logs / str(int(own)) / f"{file.replace('/', '-')}-{share}.log"
        log.parent.mkdir(exist_ok=True)
        environment = os.environ | {
            "HAL_OUTSIDE_SHARE": str(share),
            "HAL_OUTSIDE_SHARES": str(min(options.processes, FILES[file][1])),
            "HAL_OUTSIDE_EVERY": str(options.every),
            "HAL_OUTSIDE_LOG": str(log),
            "HAL_OUTSIDE_OWN": str(int(own)),
            "PYTORCH_TESTING_DEVICE_ONLY_FOR": "cuda",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(folder), os.environ.get("PYTHONPATH", "")]),
        }
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "outcomes", "-p", "no:cacheprovider", "--noconftest"),
            *("-c", os.devnull, "--rootdir", str(folder), "-k", FILES[file][0], str(folder / file)),
        ]
        with log.with_suffix(".txt").open("w") as text:
            started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=text, stderr=text))
    return started


def read(logs: Path, own: bool) -> tuple[dict[str, dict[str, Any]], dict[str, Counter[str]]]:
    """Every test's outcome, and the statistics of the operators."""
    tests: dict[str, dict[str, Any]] = {}
    calls: dict[str, Counter[str]] = {"own": Counter(), "original": Counter(), "reasons": Counter()}
    for log in sorted((logs / str(int(own))).glob("*.log")):
        for line in log.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "test" in record and (record["outcome"] != "passed" or record["test"] not in tests):
                tests[record["test"]] = record
            for name in calls.keys() & record.keys():
                calls[name].update(record[name])
    return tests, calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--processes",
        type=int,
        default=min((os.cpu_count() or 1) // 2, 8),
        help="for a file, of either kind of kernels",
    )
    parser.add_argument("--together", action="store_true", help="all files at once, each with so many processes")
    parser.add_argument("--every", type=int, default=1, help="of families of more than 300 tests run every n-th alone")
    parser.add_argument("--seconds", type=float, default=7200, help="stop after these; what is done by then counts")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--logs", help="keep the processes' output in this folder")
    parser.add_argument("--own-only", action="store_true", help="the original's outcomes lie in --logs, of another run")
    options = parser.parse_args()
    given = os.environ.get("TORCH_TESTS")
    if not given or not Path(given).is_dir():
        print("TORCH_TESTS names no folder: TORCH_TESTS=<a PyTorch checkout's test folder> make outside-tests")
        return 2
    folder = Path(given).resolve()
    import torch

    if not torch.cuda.is_available():
        print("no GPU: PyTorch's tests of its fused attention need one")
        return 2
    with tempfile.TemporaryDirectory() as made:
        logs = Path(options.logs or made)
        logs.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + options.seconds
        files = [file for file in FILES if (folder / file).exists()]
        for file in FILES.keys() - set(files):
            print(f"{file} is not in {folder}: left out")
        at_once = [files] if options.together else [[file] for file in files]
        for some in at_once:
            for process in [
                p for own in (False, True)[options.own_only :] for p in shares(folder, some, own, options, logs)
            ]:
                try:
                    process.wait(max(end - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    process.kill()
        return report(read(logs, False), read(logs, True), torch.__version__, options)


def report(original: Any, own: Any, version: str, options: argparse.Namespace) -> int:
    """Print, record, and say by the exit code whether own kernels fail where the original does not."""
    (before, _), (after, calls) = original, own
    both = before.keys() & after.keys()
    failures = sorted(
        name for name in both if after[name]["outcome"] == "failed" and before[name]["outcome"] != "failed"
    )
    mended = sorted(name for name in both if before[name]["outcome"] == "failed" and after[name]["outcome"] == "passed")
    counts = {
        name: dict(Counter(test["outcome"] for test in tests.values()))
        for name, tests in (("original", before), ("own", after))
    }
    print(f"PyTorch {version}: original {counts['original']}, own kernels {counts['own']}; {len(both)} ran in both")
    if not both:
        print("no test ran in both: see --logs")
        return 2
    for name in ("own", "original", "reasons"):
        print(f"{name}: {dict(calls[name].most_common(12))}")
    print(f"{len(mended)} fail on the original alone; {len(failures)} fail on own kernels alone")
    for name in failures:
        print(f"FAILED {name}\n{after[name]['why'][-700:]}")
    if options.record:
        record(version, options.every, counts, len(both), calls, mended, failures)
    return 1 if failures else 0


def record(
    version: str,
    every: int,
    counts: dict[str, dict[str, int]],
    both: int,
    calls: dict[str, Counter[str]],
    mended: list[str],
    failures: list[str],
) -> None:
    """Write docs/benchmarks/outside_torch.md."""
    import torch
    import triton

    outcomes = sorted({outcome for each in counts.values() for outcome in each})
    part = f"of families of more than 300 tests one in {every}" if every > 1 else "all tests"
    lines = [
        "# PyTorch's own attention tests",
        "",
        f"- date: {datetime.date.today().isoformat()}",
        f"- device: {torch.cuda.get_device_name()}",
        f"- torch: {version}, triton {triton.__version__}",
        f"- command: TORCH_TESTS=... make outside-tests ({part})",
        "",
        f"|  | {' | '.join(outcomes)} |",
        f"| --- | {' | '.join('---' for _ in outcomes)} |",
        *(f"| {name} | {' | '.join(str(each.get(o, 0)) for o in outcomes)} |" for name, each in counts.items()),
        "",
        f"{both} tests ran in both. Failures of own kernels that the original does not have: {len(failures)}; of the "
        f"original alone: {len(mended)}. A test that the time did not reach is in neither row.",
        "",
        *(f"- fails on own kernels alone: `{name}`" for name in failures),
        *(f"- fails on the original alone: `{name}`" for name in mended),
        "",
        "| operator | on own kernels | on the original |",
        "| --- | --- | --- |",
        *(
            f"| `{name}` | {calls['own'][name]} | {calls['original'][name]} |"
            for name in sorted(calls["own"].keys() | calls["original"].keys())
        ),
        "",
        "| reason for the original | calls |",
        "| --- | --- |",
        *(f"| {reason} | {number} |" for reason, number in calls["reasons"].most_common()),
    ]
    text = "\n".join(line for place, line in enumerate(lines) if line or lines[place - 1])
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
