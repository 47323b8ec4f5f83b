"""Linear layers in bfloat16 against float64, on every instruction set."""

import pytest
import torch
from torch.nn import functional

from moesaic.errors import UsageError
from moesaic.ops import native_linear as subject
from moesaic.ops.native import native_instruction_sets
from moesaic.ops.native_linear import is_served, linear, native_linear

from .expert_cases import num_threads

SETS = native_instruction_sets()
SIZES = [(1, 1, 1), (1, 300, 40), (12, 65, 17), (13, 130, 257), (40, 33, 513), (330, 70, 96), (700, 1100, 31)]
needs_kernels = pytest.mark.skipif(not SETS, reason="the native kernels are not built")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("instruction_set", SETS)
def test_each_number_is_the_sum_rounded_once(instruction_set: str, size: tuple[int, int, int], biased: bool) -> None:
    T, N, K = size
    x, weight = torch.randn(T, K).bfloat16(), torch.randn(N, K).bfloat16()
    bias = torch.randn(N).bfloat16() if biased else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    terms = x.double().abs() @ weight.double().abs().T + 1
    with num_threads(int(torch.randint(1, 5, ()))):
        y = native_linear(x, weight, bias, instruction_set=instruction_set)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + terms * 2e-6).all()


@needs_kernels
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    for T in (3, 400):
        x, weight = torch.randn(2, T, 300).bfloat16(), torch.randn(500, 300).bfloat16()
        results = []
        for threads in (1, 2, 3):
            with num_threads(threads):
                results.append(native_linear(x, weight))
        assert results[0].shape == (2, T, 500)
        assert all(torch.equal(each, results[0]) for each in results)


@needs_kernels
def test_views_are_read_right() -> None:
    x, weight = torch.randn(9, 80).bfloat16(), torch.randn(30, 40).bfloat16()
    assert torch.equal(native_linear(x[:, ::2], weight), native_linear(x[:, ::2].contiguous(), weight))


@needs_kernels
def test_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_kernels_are_faster", lambda: True)
    x, weight, bias = torch.randn(2, 3, 8).bfloat16(), torch.randn(4, 8).bfloat16(), torch.randn(4).bfloat16()
    with torch.no_grad():
        assert is_served(x, weight, bias)
        torch.testing.assert_close(linear(x, weight, bias), functional.linear(x, weight, bias))
        for other in (
            (x.float(), weight.float(), bias.float()),
            (x, weight.mT.contiguous().mT, bias),
            (x[:0], weight, bias),
        ):
            assert not is_served(*other)
            torch.testing.assert_close(linear(*other), functional.linear(*other))
        monkeypatch.setattr(subject, "_kernels_are_faster", lambda: False)
        assert not is_served(x, weight, bias)
    monkeypatch.setattr(subject, "_kernels_are_faster", lambda: True)
    assert not is_served(x, weight.requires_grad_(), bias)
    linear(x, weight, bias).sum().backward()
    assert weight.grad is not None


@needs_kernels
def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(UsageError, match="no native kernels for 'mmx' here"):
        native_linear(torch.ones(1, 8).bfloat16(), torch.ones(4, 8).bfloat16(), instruction_set="mmx")


@needs_kernels
@pytest.mark.parametrize("case", ["other inputs", "bias of one", "bias of another type", "a weight with gaps"])
def test_what_does_not_fit_is_left_to_torch_and_refused_by_the_kernels(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(subject, "_kernels_are_faster", lambda: True)
    x, weight, bias = torch.randn(2, 8).bfloat16(), torch.randn(4, 8).bfloat16(), torch.randn(4).bfloat16()
    x = x[:, :4] if case == "other inputs" else x
    weight = weight.mT.contiguous().mT if case == "a weight with gaps" else weight
    bias = {"bias of one": bias[:1], "bias of another type": bias.float()}.get(case, bias)
    with torch.no_grad():
        assert not is_served(x, weight, bias)
        with pytest.raises(UsageError, match=r"they need to be bfloat16 \(\.\.\., K\), \(N, K\) and \(N,\)"):
            native_linear(x, weight, bias)
