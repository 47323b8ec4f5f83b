"""Builds a program of csrc/tests with the kernels and a sanitizer, which checks every access, and runs it."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
SANITIZERS = ["address,undefined", "thread"]

_CSRC = Path(__file__).parents[2] / "csrc"
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
_FLAGS_BY_ENDING = {"_avx2": _AVX2, "_avx512": _AVX512, "_avx512_vnni": [*_AVX512, "-mavx512vnni"]}


def run_sanitized(program: str, arguments: list[str], sanitizer: str, tmp_path: Path) -> None:
    """Runs csrc/tests/`program`.cpp; under the thread sanitizer only the portable kernels, which compile fast."""
    assert COMPILER is not None
    x86 = platform.machine() in ("x86_64", "AMD64")
    common = ["-std=c++17", "-O0", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
    sources = [source for source in _CSRC.glob("*.cpp") if not source.name.endswith("bindings.cpp")]
    compilations = []
    for source in [*sources, _CSRC / "tests" / f"{program}.cpp"]:
        special = _flags_of(source) if x86 and sanitizer != "thread" else []
        output = tmp_path / f"{source.stem}.o"
        command = [COMPILER, *common, *special, f"-I{_CSRC}", "-c", source, "-o", output]
        compilations.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for compilation in compilations:
        errors = compilation.communicate()[1]
        assert compilation.returncode == 0, errors
    linked = subprocess.run(
        [COMPILER, *common, *tmp_path.glob("*.o"), "-o", tmp_path / program], capture_output=True, text=True
    )
    if linked.returncode:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer: {linked.stderr[-300:]}")
    result = subprocess.run([tmp_path / program, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def _flags_of(source: Path) -> list[str]:
    return next((flags for ending, flags in _FLAGS_BY_ENDING.items() if source.stem.endswith(ending)), [])
