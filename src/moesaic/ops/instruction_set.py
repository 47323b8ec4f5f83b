"""Which instruction set this machine's CPU has, and whether the C++ kernels that use it are built.

The native module asks the CPU itself. Without it torch's own kernels do all the work, so what torch reports counts.
"""

import functools
import importlib
import itertools
import platform
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

import torch

_LEVEL_OF_TORCH_CAPABILITY = {"AVX512": "avx512f", "AVX2": "avx2"}
_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "neon",
)  # fmt: skip
_AVX512 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
_FEATURES_OF_LEVEL = {
    "avx512_bf16": {*_AVX512, "avx512_vnni", "avx512_bf16"},
    "avx512_vnni": {*_AVX512, "avx512_vnni"},
    "avx512f": _AVX512,
    "avx2": {"avx2", "fma", "f16c"},
    "neon": {"neon"},
    "portable": set(),
}
_INTERFACE = 9
"""Of the native module, as csrc/bindings.cpp counts it: both rise when a function or its arguments change."""
_LEVELS_OF_EXPERTS = ("avx512_bf16", "avx512f", "avx2", "portable")
_LEVELS_OF_PACKED = ("avx512_vnni", "avx2", "portable")


@functools.cache
def _load_native() -> tuple[ModuleType | None, str]:
    """The native module, or None and why it is missing."""
    try:
        module = importlib.import_module("moesaic._native")
    except ModuleNotFoundError:
        return None, "not built"
    except ImportError as error:
        return None, f"built but does not load: {error}"
    if getattr(module, "interface", None) != _INTERFACE:
        return None, "built from other sources"
    return module, ""


def native_module() -> ModuleType | None:
    """`moesaic._native`, or None when `native_status` says why not."""
    module, _ = _load_native()
    return module


def instruction_set() -> str:
    """Best level: avx512_bf16, avx512_vnni, avx512f, avx2, neon or portable; csrc/cpu_features.h defines each."""
    native, _ = _load_native()
    if native is not None:
        return native.instruction_set()
    base = "neon" if platform.machine() in ("arm64", "aarch64") else "portable"
    return _LEVEL_OF_TORCH_CAPABILITY.get(torch.backends.cpu.get_cpu_capability(), base)


def cpu_features() -> dict[str, bool]:
    """Feature name, spelled as in /proc/cpuinfo, to whether CPU and operating system support it.

    Without the native module only what torch itself would use counts as present.
    """
    native, _ = _load_native()
    if native is not None:
        return native.cpu_features()
    present = _FEATURES_OF_LEVEL[instruction_set()]
    return {name: name in present for name in _FEATURES}


def native_status() -> str:
    """One line: `built`, or why the C++ kernels are missing and the command that builds them."""
    native, why = _load_native()
    if native is not None:
        return "built"
    if why == "not built" and not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return f"not built: this machine has no C++ compiler; install one, then: {_reinstall_command()}"
    if why == "not built":
        return f"not built: the compiler was missing or failed at installation; see why: {_reinstall_command()} -v"
    return f"{why}; build it again: {_reinstall_command()}"


def expert_kernels_status() -> str:
    """One line: the instruction set that the experts' kernels run on, and why it is none of the faster ones."""
    native = native_module()
    if native is None:
        return native_status()
    usable = native.expert_kernels()
    running, *reasons = _why_not_faster(native, usable["bfloat16"], _LEVELS_OF_EXPERTS)
    if usable["float32"][0] != running:
        running += f", {usable['float32'][0]} for float32"
    return "; ".join([running, *reasons])


def packed_kernels_status() -> str:
    """The same of the kernels for packed weights."""
    native = native_module()
    if native is None:
        return native_status()
    return "; ".join(_why_not_faster(native, native.packed_kernels(), _LEVELS_OF_PACKED))


def _why_not_faster(native: ModuleType, usable: list[str], levels: tuple[str, ...]) -> list[str]:
    """The first of `usable`, and why it is not one of the faster levels, in words for each."""
    running, features = usable[0], native.cpu_features()
    reasons = []
    for level in itertools.takewhile(lambda level: level != running, levels):
        lacking = sorted(name for name in _FEATURES_OF_LEVEL[level] if not features[name])
        why = f"this CPU lacks {', '.join(lacking)}" if lacking else "the compiler could not build it"
        reasons.append(f"{level} not: {why}")
    return [running, *reasons]


def _reinstall_command() -> str:
    root = Path(__file__).parents[3]
    source = f"-e {shlex.quote(str(root))}" if (root / "CMakeLists.txt").is_file() else "SOURCE_FOLDER_OF_MOESAIC"
    return f"{shlex.quote(sys.executable)} -m pip install --force-reinstall --no-deps {source}"
