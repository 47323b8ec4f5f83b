"""Muon's step in C++ against a plain loop over the matrices in float64, on every instruction set of this machine."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.errors import UsageError
from moesaic.ops.native import native_instruction_sets
from moesaic.ops.native_muon import MatrixStack, muon_step

from .sanitized import COMPILER, SANITIZERS, run_sanitized

INSTRUCTION_SETS = native_instruction_sets() or [pytest.param("", marks=pytest.mark.skip(reason="kernels not built"))]
EVERY = pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
COEFFICIENTS = [(3.5, -4.8, 2.1), (2.9, -3.9, 1.7), (1.9, -1.3, 0.4)]
MOMENTUM, KEEP = 0.9, 0.97


def make_stack(number: int, rows: int, columns: int, step_size: float = 0.3) -> MatrixStack:
    parameters, gradients, momenta = (torch.randn(number, rows, columns) for _ in range(3))
    return MatrixStack((rows, columns), parameters, gradients * 3, momenta, KEEP, step_size, COEFFICIENTS)


def copied(stack: MatrixStack) -> MatrixStack:
    tensors = {name: getattr(stack, name).clone() for name in ("parameters", "gradients", "momenta")}
    return replace(stack, **tensors)


def oracle(stack: MatrixStack) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameter and momentum of each matrix after the step."""
    shape = (-1, *stack.size)
    tensors = (each.reshape(shape).double() for each in (stack.parameters, stack.gradients, stack.momenta))
    for parameter, gradient, momentum in zip(*tensors, strict=True):
        moved = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        x = MOMENTUM * moved + (1 - MOMENTUM) * gradient
        x = x / (x.norm() + 1e-7)
        for a, b, c in stack.coefficients:
            gram = x @ x.mT
            x = a * x + b * gram @ x + c * gram @ gram @ x
        yield stack.keep * parameter - (stack.step_size * x if gradient.any() else 0.0), moved


def take_step(*stacks: MatrixStack, instruction_set: str = "") -> None:
    muon_step(stacks, momentum=MOMENTUM, instruction_set=instruction_set)


def assert_stepped(stack: MatrixStack, before: MatrixStack) -> None:
    parameters, momenta = (each.reshape(-1, *stack.size) for each in (stack.parameters, stack.momenta))
    for index, (parameter, momentum) in enumerate(oracle(before)):
        torch.testing.assert_close(parameters[index].double(), parameter, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(momenta[index].double(), momentum, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_no_matrix_leaves_its_arrays(sanitizer: str, tmp_path: Path, seed: int) -> None:
    run_sanitized("muon_tests", [str(seed), "5" if sanitizer == "thread" else "10"], sanitizer, tmp_path)


@EVERY
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 40), (40, 1), (64, 64), (37, 41), (20, 300), (300, 20), (256, 257), (530, 19), (17, 513)]
)
def test_each_matrix_steps_alone(instruction_set: str, size: tuple[int, int]) -> None:
    stack = make_stack(3, *size)
    before = copied(stack)
    take_step(stack, instruction_set=instruction_set)
    assert_stepped(stack, before)
    assert torch.equal(stack.gradients, before.gradients)


@EVERY
def test_several_stacks_and_stacks_of_stacks_in_one_call(instruction_set: str) -> None:
    tall = replace(make_stack(2, 24, 10, step_size=0.1), coefficients=COEFFICIENTS[1:])
    gate_and_up = make_stack(3, 2 * 12, 16)
    halves = replace(gate_and_up, size=(12, 16), step_size=0.2, keep=0.5)
    empty = make_stack(0, 8, 8)
    before = [copied(tall), copied(halves)]
    take_step(tall, empty, halves, instruction_set=instruction_set)
    for after, earlier in zip((tall, halves), before, strict=True):
        assert_stepped(after, earlier)


@EVERY
def test_a_matrix_without_a_gradient_only_decays(instruction_set: str) -> None:
    stack = make_stack(3, 20, 33)
    stack.gradients[0] = 0
    stack.gradients[2] = 0
    stack.gradients[2, 19, 32] = 1e-30  # whose square is no float
    before = copied(stack)
    take_step(stack, instruction_set=instruction_set)
    assert torch.equal(stack.parameters[0], before.parameters[0] * KEEP)
    assert_stepped(stack, before)


@EVERY
def test_the_number_of_threads_does_not_change_a_bit(instruction_set: str) -> None:
    stack = make_stack(9, 48, 70)
    other = copied(stack)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        take_step(stack, instruction_set=instruction_set)
        torch.set_num_threads(3)
        take_step(other, instruction_set=instruction_set)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(stack.parameters, other.parameters)
    assert torch.equal(stack.momenta, other.momenta)


@EVERY
def test_what_is_served(instruction_set: str) -> None:
    del instruction_set  # any: the kernels are built
    stack = make_stack(2, 256, 300)
    assert stack.is_served
    assert not make_stack(1, 257, 300).is_served
    with pytest.raises(UsageError, match=r"matrices 257 x 300 of torch.float32 are left to torch"):
        take_step(stack, make_stack(1, 257, 300))
    transposed = stack.gradients.mT.contiguous().mT
    assert not replace(stack, gradients=transposed).is_served
    assert not replace(stack, parameters=stack.parameters.bfloat16()).is_served


@EVERY
def test_an_unknown_instruction_set_is_refused(instruction_set: str) -> None:
    with pytest.raises(UsageError, match=f"no native kernels for 'sse9' here; choose .*{instruction_set}"):
        take_step(make_stack(1, 4, 4), instruction_set="sse9")
