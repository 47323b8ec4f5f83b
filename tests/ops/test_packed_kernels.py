"""The C++ kernels for packed weights, below the Python that packs: programs of csrc/tests, and the binding."""

from pathlib import Path

import pytest
import torch

from moesaic.ops.instruction_set import native_module, packed_kernels_status

from .sanitized import COMPILER, SANITIZERS, run_sanitized

NATIVE = native_module()
SETS = NATIVE.packed_kernels() if NATIVE else []

needs_kernels = pytest.mark.skipif(NATIVE is None, reason="the native kernels are not built")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_equal_plain_loops_under_sanitizers(sanitizer: str, tmp_path: Path, seed: int) -> None:
    """Every instruction set against double arithmetic on the same codes, with every access checked."""
    cases = "3" if sanitizer == "thread" else "10"
    run_sanitized("packed_tests", [str(seed), cases, "230"], sanitizer, tmp_path)
    run_sanitized("block_tests", [str(seed), cases], sanitizer, tmp_path)
    run_sanitized("pack_tests", [str(seed), cases], sanitizer, tmp_path)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("group_size", [32, 64])
def test_the_binding_reads_the_layout_that_it_documents(instruction_set: str, group_size: int) -> None:
    """8 bits: blocks of 16 bfloat16 scales and then, for each 4 inputs, 16 outputs' codes."""
    assert NATIVE is not None
    panels, groups, T = 3, 2, 5
    N, K = 16 * panels - 3, group_size * groups - 7
    numbers = torch.randint(-127, 128, (panels, groups, group_size // 4, 16, 4))
    scales = torch.rand(panels, groups, 16).bfloat16()
    codes = (numbers + 128).to(torch.uint8).flatten(2)
    data = torch.cat([scales.view(torch.uint8), codes], -1).contiguous()
    assert data.numel() == NATIVE.packed_bytes(N, K, group_size, 8)

    weight = numbers.double() * scales.double()[:, :, None, :, None]
    weight = weight.permute(0, 3, 1, 2, 4).reshape(16 * panels, groups * group_size)[:N, :K]
    x, bias, y = torch.randn(T, K), torch.randn(N), torch.full((T, N), torch.nan)
    packed = (N, K, group_size, 8, b"", data.data_ptr())
    arguments = (bias.data_ptr(), x.data_ptr(), T, 2, instruction_set, y.data_ptr())
    assert NATIVE.packed_linear(packed, *arguments) == 0
    # Rounding moves an input by at most 1/254 of its group's largest.
    bound = weight.abs().sum(-1) * x.abs().amax(-1, keepdim=True) / 254
    assert bool(((y - (x.double() @ weight.T + bias)).abs() <= 1.001 * bound + 1e-5).all())


@needs_kernels
def test_what_cannot_be_computed_is_refused() -> None:
    assert NATIVE is not None
    x, y = torch.zeros(1, 32), torch.zeros(1, 16)
    data = torch.zeros(NATIVE.packed_bytes(16, 32, 32, 8), dtype=torch.uint8)
    packed = (16, 32, 32, 8, b"", data.data_ptr())
    assert NATIVE.packed_linear(packed, 0, x.data_ptr(), 1, 1, "mmx", y.data_ptr()) == -1
    assert NATIVE.packed_linear((16, 32, 48, 8, b"", 0), 0, x.data_ptr(), 1, 1, "", y.data_ptr()) == -3
    with pytest.raises(ValueError, match="16 entries"):
        NATIVE.packed_linear((16, 32, 32, 4, b"abc", 0), 0, x.data_ptr(), 1, 1, "", y.data_ptr())


@needs_kernels
def test_status_says_why_no_faster_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NATIVE is not None
    assert packed_kernels_status().split(";")[0] == SETS[0]
    features = dict.fromkeys(NATIVE.cpu_features(), True)
    monkeypatch.setattr(NATIVE, "packed_kernels", lambda: ["avx2", "portable"])
    monkeypatch.setattr(NATIVE, "cpu_features", lambda: {**features, "avx512_vnni": False})
    assert packed_kernels_status() == "avx2; avx512_vnni not: this CPU lacks avx512_vnni"
