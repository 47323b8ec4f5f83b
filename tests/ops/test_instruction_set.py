import platform
from pathlib import Path

import pytest
import torch

from moesaic.ops import instruction_set as subject

CPUINFO = Path("/proc/cpuinfo")
LEVELS = ("portable", "neon", "avx2", "avx512f", "avx512_vnni", "avx512_bf16")
NATIVE_BUILT = subject.native_status() == "built"


def cpuinfo_flags() -> set[str]:
    return next(
        set(line.split(":")[1].split()) for line in CPUINFO.read_text().splitlines() if line.startswith("flags")
    )


@pytest.mark.skipif(not NATIVE_BUILT, reason="the native module is not built")
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not CPUINFO.exists(), reason="the oracle is x86 /proc/cpuinfo"
)
def test_every_feature_agrees_with_the_kernel():
    flags = cpuinfo_flags()
    assert subject.cpu_features() == {name: name in flags for name in subject.cpu_features()}
    assert "avx512_bf16" in subject.cpu_features()


def test_level_follows_from_the_features():
    features = subject.cpu_features()
    level = subject.instruction_set()
    assert level in LEVELS
    if level == "portable":
        assert not (features["avx2"] and features["fma"] and features["f16c"])
        assert not features["neon"]
    else:
        assert features[level]
    if level.startswith("avx512"):
        assert all(features[name] for name in ("avx2", "fma", "f16c", "avx512bw", "avx512dq", "avx512vl"))


def test_without_the_native_module_torch_decides(monkeypatch: pytest.MonkeyPatch):
    with_native = subject.cpu_features()
    monkeypatch.setattr(subject, "_load_native", lambda: (None, "not built"))
    level = subject.instruction_set()
    assert (level in ("avx512f", "avx2")) == (torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2"))
    features = subject.cpu_features()
    assert list(features) == list(with_native)
    if NATIVE_BUILT:
        assert not [name for name, present in features.items() if present and not with_native[name]]


@pytest.mark.parametrize(
    ("why", "compiler", "words"),
    [
        ("not built", None, "no C++ compiler"),
        ("not built", "/usr/bin/c++", "missing or failed at installation"),
        ("built but does not load: undefined symbol", "/usr/bin/c++", "undefined symbol"),
    ],
)
def test_status_names_the_reason_and_a_command(monkeypatch: pytest.MonkeyPatch, why, compiler, words):
    monkeypatch.setattr(subject, "_load_native", lambda: (None, why))
    monkeypatch.setattr(subject.shutil, "which", lambda name: compiler)
    status = subject.native_status()
    assert words in status
    assert "-m pip install --force-reinstall --no-deps" in status
    assert "\n" not in status


@pytest.mark.skipif(not NATIVE_BUILT, reason="the native module is not built")
def test_a_module_of_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch):
    module = subject.native_module()
    subject._load_native.cache_clear()
    try:
        monkeypatch.setattr(module, "interface", -1)
        assert subject.native_module() is None
        assert "built from other sources; build it again" in subject.native_status()
    finally:
        subject._load_native.cache_clear()


@pytest.mark.skipif(not NATIVE_BUILT, reason="the native module is not built")
def test_status_of_the_kernels_says_why_no_faster_ones_run(monkeypatch: pytest.MonkeyPatch):
    features = dict.fromkeys(subject.cpu_features(), True)
    status, native = subject.expert_kernels_status(), subject.native_module()
    assert native is not None
    assert status.partition(";")[0].partition(",")[0] == native.expert_kernels()["bfloat16"][0]
    usable = {"float32": ["portable"], "bfloat16": ["portable"]}
    monkeypatch.setattr(native, "expert_kernels", lambda: usable)
    monkeypatch.setattr(native, "cpu_features", lambda: {**features, "fma": False, "avx512_bf16": False})
    assert subject.expert_kernels_status() == (
        "portable; avx512_bf16 not: this CPU lacks avx512_bf16, fma; avx512f not: this CPU lacks fma; "
        "avx2 not: this CPU lacks fma"
    )
    monkeypatch.setattr(native, "cpu_features", lambda: features)
    assert "avx2 not: the compiler could not build it" in subject.expert_kernels_status()
    usable = {"float32": ["avx512f"], "bfloat16": ["avx512_bf16", "avx512f"]}
    assert subject.expert_kernels_status() == "avx512_bf16, avx512f for float32"
