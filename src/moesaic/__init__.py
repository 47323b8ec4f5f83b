"""moesaic: many small experts, one picture. Train, load, run and explain mixture-of-experts language models.

import moesaic
model = moesaic.load("runs/demo/sparse")
tokenizer = moesaic.load_tokenizer("runs/demo/sparse")
print(moesaic.generate(model, tokenizer, "def main(", max_tokens=64))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.analysis.record import record_routing, replay_routing
    from moesaic.analysis.trace import read_trace
    from moesaic.checkpoint.load import load, load_tokenizer
    from moesaic.config import ModelConfig, MoEConfig, TrainConfig
    from moesaic.engine.generate import generate
    from moesaic.errors import MoesaicError, UsageError

__version__ = "0.1.0"

# Loaded on first use: `import moesaic` and `moesaic --help` need not wait for torch.
_HOME = {
    "load": "moesaic.checkpoint.load",
    "load_tokenizer": "moesaic.checkpoint.load",
    "generate": "moesaic.engine.generate",
    "record_routing": "moesaic.analysis.record",
    "read_trace": "moesaic.analysis.trace",
    "replay_routing": "moesaic.analysis.record",
    "ModelConfig": "moesaic.config",
    "MoEConfig": "moesaic.config",
    "TrainConfig": "moesaic.config",
    "MoesaicError": "moesaic.errors",
    "UsageError": "moesaic.errors",
}
__all__ = [
    "MoEConfig",
    "ModelConfig",
    "MoesaicError",
    "TrainConfig",
    "UsageError",
    "generate",
    "load",
    "load_tokenizer",
    "read_trace",
    "record_routing",
    "replay_routing",
]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moesaic' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)
