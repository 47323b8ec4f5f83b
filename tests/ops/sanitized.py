"""Builds a program of csrc/tests with the kernels and a sanitizer, which checks every access, and runs it."""

import functools
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

COMPILER = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
SANITIZERS = ["address,undefined", "thread"]

_CSRC = Path(__file__).parents[2] / "csrc"
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
_FLAGS_BY_ENDING = {
    "_avx2": _AVX2,
    "_avx512": _AVX512,
    "_avx512_bf16": [*_AVX512, "-mavx512bf16"],
    "_avx512_vnni": [*_AVX512, "-mavx512vnni"],
}
_KERNELS = tempfile.TemporaryDirectory(prefix="moesaic-kernels-")  # removed when this process ends


def run_sanitized(program: str, arguments: list[str], sanitizer: str, tmp_path: Path) -> None:
    """Runs csrc/tests/`program`.cpp; under the thread sanitizer only the portable kernels, which compile fast."""
    kernels = _compiled_kernels(sanitizer)
    objects = _compiled([_CSRC / "tests" / f"{program}.cpp"], sanitizer, tmp_path)
    linked = subprocess.run(
        [*_compiler(sanitizer), *kernels, *objects, "-o", tmp_path / program], capture_output=True, text=True
    )
    if linked.returncode:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer: {linked.stderr[-300:]}")
    result = subprocess.run([tmp_path / program, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


@functools.cache
def _compiled_kernels(sanitizer: str) -> list[Path]:
    """Objects of all that the programs share, compiled once by each test process."""
    folder = Path(_KERNELS.name) / sanitizer
    folder.mkdir()
    sources = [source for source in _CSRC.glob("*.cpp") if not source.name.endswith("bindings.cpp")]
    return _compiled(sources, sanitizer, folder)


def _compiled(sources: list[Path], sanitizer: str, folder: Path) -> list[Path]:
    """Their objects, compiled side by side into `folder`."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    objects, compilations = [], []
    for source in sources:
        special = _flags_of(source) if x86 and sanitizer != "thread" else []
        objects.append(folder / f"{source.stem}.o")
        command = [*_compiler(sanitizer), *special, f"-I{_CSRC}", "-c", source, "-o", objects[-1]]
        compilations.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    errors = [compilation.communicate()[1] for compilation in compilations]
    for compilation, message in zip(compilations, errors, strict=True):
        assert compilation.returncode == 0, message
    return objects


def _compiler(sanitizer: str) -> list[str]:
    assert COMPILER is not None
    return [COMPILER, "-std=c++17", "-O0", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]


def _flags_of(source: Path) -> list[str]:
    return next((flags for ending, flags in _FLAGS_BY_ENDING.items() if source.stem.endswith(ending)), [])
