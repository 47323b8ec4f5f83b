def instruction_set() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def expert_kernels() -> list[str]: ...
def plan_size(num_tokens: int, num_rows: int, num_experts: int) -> int: ...
def make_plan(token_ids: int, expert_ids: int, num_tokens: int, num_rows: int, num_experts: int, plan: int) -> int: ...

class Experts:
    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        element: int,
        activation: tuple[int, float, float],
        plan: int,
        inputs: tuple[int, ...],
    ) -> None: ...

def experts_forward(experts: Experts, threads: int, instruction_set: str, pre_activations: int, y: int) -> int: ...
def experts_backward(
    experts: Experts, threads: int, instruction_set: str, pre_activations: int, grad_y: int, gradients: tuple[int, ...]
) -> int: ...

# (rows, columns, group_size, bits, table of 16 bytes or b"", address)
_Packed = tuple[int, int, int, int, bytes, int]

def packed_kernels() -> list[str]: ...
def packed_bytes(rows: int, columns: int, group_size: int, bits: int) -> int: ...
def packed_linear(
    weight: _Packed, bias: int, x: int, num_tokens: int, threads: int, instruction_set: str, y: int
) -> int: ...
def packed_experts_forward(
    sizes: tuple[int, int, int, int, int],
    activation: tuple[int, float, float],
    plan: int,
    inputs: tuple[int, int, int, int],
    gate_up: _Packed,
    down: _Packed,
    threads: int,
    instruction_set: str,
    y: int,
) -> int: ...
def rms_norm(
    x: int, weight: int, num_rows: int, size: int, eps: float, threads: int, instruction_set: str, y: int
) -> int: ...
def attend(
    sizes: tuple[int, int, int, int, int, int],
    inputs: tuple[int, int, int, int],
    norms: tuple[int, float, int, int],
    rotary: tuple[int, int, int, int],
    cache: tuple[int, int, int],
    mask: tuple[int, int],
    scale: float,
    threads: int,
    instruction_set: str,
    y: int,
) -> int: ...
def route(
    sizes: tuple[int, int, int, int],
    scores: tuple[int, int, float, float],
    inputs: tuple[int, int, int, int],
    threads: int,
    instruction_set: str,
    outputs: tuple[int, int, int],
) -> int: ...
