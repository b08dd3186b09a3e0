"""PyTorch's own attention tests on the CPU, as they are and with hal in place.

    TORCH_TESTS=<folder `test` of a PyTorch checkout> python tests/outside/torch_cpu.py

The checkout should be of the PyTorch that is installed. `F.scaled_dot_product_attention` is then
`hal_nn.override_sdpa`'s function, and nn.MultiheadAttention is hal_nn.PhotonicMultiHeadAttention. A test that fails
with hal alone is printed; one that only wants an error of another type, wants torch's fused operator to be called, or
compares with torch's own drawing of dropout, is counted apart. The exit code is 1 where another one is left.
`--record` writes the counts to docs/benchmarks/outside_torch_cpu.json, after every `--part` tests anew. With `--logs` a
run that was stopped goes on where it was: a part runs with torch, then the same with hal. `--rest` runs the tests that
the record does not have, which is so with the same tests and the same `--every`, and adds them to it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from in_place import read_log

HERE = Path(__file__).resolve().parent
RECORD = HERE.parents[1] / "docs" / "benchmarks" / "outside_torch_cpu.json"
#: Files of a checkout's test folder, and the tests that are about attention on the CPU; "" for all.
FILES = {"test_transformers.py": "TestSDPA or TestAttnBias or scaled_dot_product", "nn/test_multihead_attention.py": ""}
#: Tests that are about torch's fused operator, and pass only where it is called.
FUSED = re.compile(r"fast_path_mock")
#: Tests that compare with torch's own drawing of dropout, which a device does not repeat.
DRAWN = re.compile(r"TestTransformers\w*::test_scaled_dot_product_attention_.*_dropout_p_0_[25]_")
#: What a test says that wanted an error of another type or with another sentence.
OTHER_ERROR = re.compile(
    r"does not match|not raised|DID NOT RAISE|^hal_core\.errors\.\w+Error|ContractError|UnsupportedError"
)


def run_part(folder: Path, file: str, own: bool, log: Path, every: int, most: int, after: int) -> None:
    """Run at most `most` tests of a file that the log does not have, without the first `after` of its order."""
    environment = os.environ | {
        "HAL_OUTSIDE_OWN": str(int(own)),
        "HAL_OUTSIDE_LOG": str(log),
        "HAL_OUTSIDE_EVERY": str(every),
        "HAL_OUTSIDE_MOST": str(most),
        "HAL_OUTSIDE_AFTER": str(after),
        "PYTORCH_TESTING_DEVICE_ONLY_FOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(folder), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "in_place", "-p", "no:cacheprovider", "--noconftest"),
        *("-c", os.devnull, "--rootdir", str(folder), "-k", FILES[file], str(folder / file)),
    ]
    with log.with_suffix(".txt").open("a") as text:
        subprocess.run(command, cwd=folder, env=environment, stdout=text, stderr=text, check=False)


def outcomes(log: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """(every test's outcome, one that ended the process failed; calls that hal ran)."""
    records = read_log(log)
    found = {
        one["began"]: {"test": one["began"], "outcome": "failed", "why": "ended the process"}
        for one in records
        if "began" in one
    }
    found |= {one["test"]: one for one in records if "test" in one}
    return found, sum(one.get("calls", 0) for one in records)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="of functions of more than 300 tests run every n-th alone")
    parser.add_argument("--part", type=int, default=400, help="tests of a part")
    parser.add_argument("--source", default="PyTorch's own checkout", help="where the tests are from, for the record")
    parser.add_argument("--rest", action="store_true", help="run what the record does not have, and add it")
    parser.add_argument("--logs", help="keep outcomes and pytest's output in this folder, and go on with what it has")
    options = parser.parse_args()
    given = os.environ.get("TORCH_TESTS")
    if not given or not Path(given).is_dir():
        print("TORCH_TESTS names no folder: pass the folder `test` of a PyTorch checkout")
        return 2
    folder = Path(given).resolve()
    files = [name for name in FILES if (folder / name).exists()]
    earlier = json.loads(RECORD.read_text(encoding="utf-8")) if options.rest else None
    after = int(earlier["chosen"].split()[0]) if earlier else 0
    collected = dict(earlier["files"]) if earlier else {}
    code = 2
    with tempfile.TemporaryDirectory() as made:
        logs = Path(options.logs or made).resolve()
        logs.mkdir(parents=True, exist_ok=True)
        pair = logs / "torch.log", logs / "hal.log"
        for file in reversed(files):  # the short one first
            left = after < collected.get(file, after + 1)
            while left:  # a part of no test ends it: a part may have ended early
                left = 0
                for log, own in zip(pair, (False, True), strict=True):
                    run_part(folder, file, own, log, options.every, options.part, after)
                    state = next(one for one in reversed(read_log(log)) if "left" in one)
                    collected[file], left = state["collected"], left + state["left"]
                if file == files[0]:  # before, how many tests there are is not known
                    code = report(*judged(*pair, options, collected, not left), earlier)
            after = max(0, after - collected[file])
    return code


def judged(
    torch_log: Path, hal_log: Path, options: argparse.Namespace, collected: dict[str, int], whole: bool
) -> tuple[Any, Any, int, dict[str, Any], bool]:
    """The arguments of `report` from two logs: the tests that both have, or all of torch's where the run is whole."""
    import torch

    before, _ = outcomes(torch_log)
    after, calls = outcomes(hal_log)
    if not whole:
        before = {name: one for name, one in before.items() if name in after}
    chosen = f"{len(before)} of {sum(collected.values())}"
    if options.every > 1:
        chosen += f", of functions of more than 300 tests one in {options.every}"
    conditions = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "tests": options.source,
        "chosen": chosen,
        "files": collected,
    }
    return before, after, calls, conditions, options.record


def report(
    before: Any, after: Any, calls: int, conditions: dict[str, Any], record: bool, earlier: dict[str, Any] | None
) -> int:
    """Print, record with what `earlier` has, and say by the exit code whether hal fails where torch does not."""
    missing = before.keys() - after.keys()
    failed = sorted(
        name
        for name, one in before.items()
        if one["outcome"] != "failed" and after.get(name, {"outcome": "failed"})["outcome"] == "failed"
    )
    other = [name for name in failed if name in after and OTHER_ERROR.search(after[name]["why"])]
    fused = [name for name in failed if FUSED.search(name)]
    drawn = [name for name in failed if DRAWN.search(name) and "not close" in after.get(name, {}).get("why", "")]
    left = [name for name in failed if name not in {*other, *fused, *drawn}]
    counts = {
        name: dict(Counter(one["outcome"] for one in tests.values()))
        for name, tests in (("torch", before), ("hal", after))
    }
    print(f"PyTorch {conditions['torch']}: torch {counts['torch']}, hal {counts['hal']}; hal ran {calls} calls")
    print(
        f"{len(missing)} did not run with hal; {len(other)} want another error; {len(fused)} a fused operator; "
        f"{len(drawn)} torch's own drawing of dropout"
    )
    print(f"{len(left)} fail with hal alone")
    for name in failed:
        what = "ERROR TYPE" if name in other else "FUSED" if name in fused else "DROPOUT" if name in drawn else "FAILED"
        print(f"{what} {name}\n  {after.get(name, {}).get('why', '')[:500]}")
    if record:
        found = conditions | {
            "counts": counts,
            "calls": calls,
            "another error": other,
            "torch's fused operator": fused,
            "torch's own drawing of dropout": drawn,
            "failures of hal alone": left,
        }
        if earlier:
            found = joined(earlier, found)
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 2 if not before else int(bool(left))


def joined(earlier: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """One record of two whose tests differ; conditions of the later one."""
    had, of = earlier["chosen"].split(" of ", 1)
    both = found | {"chosen": f"{int(had) + int(found['chosen'].split()[0])} of {of}"}
    both["counts"] = {
        name: dict(Counter(counts) + Counter(earlier["counts"][name])) for name, counts in found["counts"].items()
    }
    for name, value in found.items():
        if isinstance(value, int | list):
            both[name] = earlier[name] + value
    return both


if __name__ == "__main__":
    sys.exit(main())
