"""Build the SPIR-V files beside the shaders: python -m hal_vulkan.kernels.build_shaders. Nothing is compiled at run
time.

Needs glslangValidator, from HAL_GLSLANG (one or more paths, as in PATH) or PATH. The committed files were made by the
versions of `needed_version`; the output of another version has its words in another order and cannot be compared.

Attention shaders are built for each dtype (NAME.float32.spv and so on), those on cooperative matrices for the dtypes of
the matrices.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent / "shaders"
_HALF = {"float32": 0, "float16": 1, "bfloat16": 2}  # the shaders' names of dtypes
_CAPABILITY, _EXTENSION, _TYPE_FLOAT = 17, 10, 22  # of SPIR-V's instructions
_BFLOAT16 = 5116, 5118  # BFloat16TypeKHR, BFloat16CooperativeMatrixKHR
_PLAIN, _MATRIX = 12, 15  # of Debian 12's glslang-tools; the first seen to take GL_NV_cooperative_matrix2


def sources() -> list[Path]:
    return sorted(FOLDER.glob("*.comp"))


def targets(source: Path) -> dict[str, list[str]]:
    """File name of each binary of a shader, and its options."""
    text = source.read_text(encoding="utf-8")
    if "problem.glsl" not in text:
        return {f"{source.stem}.spv": []}
    dtypes = ["float16", "bfloat16"] if "matrix.glsl" in text else ["float32", "float16", "bfloat16"]
    return {f"{source.stem}.{dtype}.spv": [f"-DHALF={_HALF[dtype]}"] for dtype in dtypes}


def with_bfloat16(spirv: bytes) -> bytes:
    """A module whose 16-bit floats, which must all be components of matrices, are bfloat16 instead of float16.

    glslangValidator 15 has no GL_EXT_bfloat16. SPV_KHR_bfloat16 differs by an operand of the type and two capabilities.
    """
    words = [*struct.unpack(f"<{len(spirv) // 4}I", spirv)]
    header, body, at = words[:5], [], 5
    capabilities: list[int] = []
    while at < len(words):
        count, code = words[at] >> 16, words[at] & 0xFFFF
        instruction = words[at : at + count]
        if code == _CAPABILITY:
            capabilities += instruction
        elif (code, count) == (_TYPE_FLOAT, 3) and instruction[2] == 16:
            body += [4 << 16 | _TYPE_FLOAT, *instruction[1:], 0]  # the encoding BFloat16KHR
        else:
            body += instruction
        at += count
    name = b"SPV_KHR_bfloat16".ljust(20, b"\0")
    extension = [(1 + len(name) // 4) << 16 | _EXTENSION, *struct.unpack(f"<{len(name) // 4}I", name)]
    capabilities += [word for number in _BFLOAT16 for word in (2 << 16 | _CAPABILITY, number)]
    return struct.pack(f"<{len(header + capabilities + extension + body)}I", *header, *capabilities, *extension, *body)


def needed_version(source: Path) -> int:
    """The major version of glslangValidator that a shader is built with."""
    return _MATRIX if "matrix.glsl" in source.read_text(encoding="utf-8") else _PLAIN


@lru_cache(maxsize=1)
def compilers() -> dict[int, str]:
    """Path of each installed glslangValidator by major version; HAL_GLSLANG goes before PATH."""
    named = [path for path in os.environ.get("HAL_GLSLANG", "").split(os.pathsep) if path]
    found: dict[int, str] = {}
    for path in filter(None, (shutil.which(name) for name in [*named, "glslangValidator"])):
        told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
        version = re.search(r"Glslang Version: \d+:(\d+)", told)
        if version:
            found.setdefault(int(version[1]), path)
    return found


def why_not(source: Path) -> str | None:
    """Why a shader cannot be built here; None where it can."""
    version, found = needed_version(source), compilers()
    if version in found:
        return None
    there = (
        f"found {', '.join(map(str, sorted(found)))}"
        if found
        else "none is installed; Debian: apt-get install glslang-tools"
    )
    return f"{source.name} is built by glslangValidator {version} ({there}): put it on PATH or name it in HAL_GLSLANG"


def build(source: Path, folder: Path) -> list[Path]:
    """Compile a shader into `folder`; the files made. Raises RuntimeError with what is missing or the compiler's
    message.
    """
    if reason := why_not(source):
        raise RuntimeError(reason)
    made = []
    for name, options in targets(source).items():
        compiler, path = compilers()[needed_version(source)], folder / name
        environment = "vulkan1.3" if "nv2" in source.stem else "vulkan1.2"  # the oldest that takes the extension
        command = [compiler, "--target-env", environment, "-V", *options, f"-I{FOLDER}", str(source), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name}: {done.stdout}{done.stderr}")
        if name.endswith(".bfloat16.spv") and needed_version(source) == _MATRIX:
            path.write_bytes(with_bfloat16(path.read_bytes()))
        made.append(path)
    return made


def main() -> int:
    """Build what can be built here, and say what cannot. 1 where something could not."""
    failed = 0
    for source in sources():
        if reason := why_not(source):
            sys.stdout.write(f"not built: {reason}\n")
            failed = 1
            continue
        for path in build(source, FOLDER):
            sys.stdout.write(f"{path.name}  {path.stat().st_size} bytes\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
