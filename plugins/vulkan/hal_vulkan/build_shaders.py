"""Builds the SPIR-V beside the shaders: python -m hal_vulkan.build_shaders. Needs glslangValidator (Debian: glslang-tools).

Attention shaders are built twice: NAME.float32.spv and NAME.float16.spv. Nothing is compiled at run time.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "shaders"


def sources() -> list[Path]:
    return sorted(FOLDER.glob("*.comp"))


def targets(source: Path) -> dict[str, list[str]]:
    """File name of each binary of a shader, and its options."""
    if "problem.glsl" not in source.read_text(encoding="utf-8"):
        return {f"{source.stem}.spv": []}
    return {f"{source.stem}.float32.spv": ["-DHALF=0"], f"{source.stem}.float16.spv": ["-DHALF=1"]}


def build(folder: Path) -> list[Path]:
    """Compile every shader into `folder`; the files made. Raises RuntimeError with the compiler's message."""
    compiler = shutil.which("glslangValidator")
    if compiler is None:
        raise RuntimeError("glslangValidator is not installed; Debian: apt-get install glslang-tools")
    made = []
    for source in sources():
        for name, options in targets(source).items():
            path = folder / name
            command = [compiler, "--target-env", "vulkan1.2", "-V", *options, f"-I{FOLDER}", str(source), "-o", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode:
                raise RuntimeError(f"{source.name}: {done.stdout}{done.stderr}")
            made.append(path)
    return made


if __name__ == "__main__":
    for path in build(FOLDER):
        sys.stdout.write(f"{path.name}  {path.stat().st_size} bytes\n")
