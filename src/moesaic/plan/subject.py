"""What is planned: a preset, a Hugging Face config.json or directory, a run directory, or a run's TOML file."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesaic.accounting import count_parameters
from moesaic.config import ModelConfig, TrainConfig
from moesaic.config_io import from_mapping, read_train_config
from moesaic.errors import MoesaicError, UsageError
from moesaic.presets import PRESETS
from moesaic.published_models import PUBLISHED


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A model, by its shape alone. Equal only to itself, so that what is counted once can be looked up fast."""

    name: str
    config: ModelConfig
    extra_parameters: int = 0
    """What the model has beside, or less than, our decoder of that config; every token uses it."""
    kv_layers: int | None = None
    """Layers that keep keys and values; None: all."""
    stored_as: str = "bfloat16"
    source: str = ""

    @property
    def total(self) -> int:
        return count_parameters(self.config).total + self.extra_parameters

    @property
    def active(self) -> int:
        return count_parameters(self.config).active + self.extra_parameters

    @property
    def kv_share(self) -> float:
        """Of the layers, those that keep keys and values."""
        return 1.0 if self.kv_layers is None else self.kv_layers / self.config.num_hidden_layers


def find_subject(text: str) -> Subject:
    """Raises UsageError where nothing of that name is known, with the nearest, and for files that say too little."""
    name = text.lower().replace("_", "-")
    if name in PUBLISHED:
        return published_subject(name)
    if name in PRESETS:
        return Subject(name=name, config=from_mapping(ModelConfig, PRESETS[name]), source="a preset of moesaic")
    path = Path(text).expanduser()
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UsageError(f"{text} has no config.json; name a run, a Hugging Face directory, or a preset")
    if path.is_file():
        return _from_file(path)
    known = sorted({*PUBLISHED, *PRESETS})
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]}?" if nearest else f"presets are {', '.join(known)}"
    raise UsageError(f"{text} is no preset, and no file or directory with a config; {hint}")


def published_subject(name: str) -> Subject:
    model = PUBLISHED[name]
    return Subject(
        name=name,
        config=from_mapping(ModelConfig, model.config),
        extra_parameters=sum(model.extra.values()),
        kv_layers=model.kv_layers,
        stored_as=model.stored_as,
        source=model.source,
    )


def _from_file(path: Path) -> Subject:
    name = path.parent.name if path.name == "config.json" else path.stem
    if path.suffix == ".toml":
        return Subject(name=name, config=_train_config(path).model, stored_as="float32", source=str(path))
    values = _read_json(path)
    if "model_type" in values:
        return Subject(name=name, config=_from_hugging_face(path, values), stored_as=_stored_as(values),
                       source=str(path))  # fmt: skip
    if "model" in values:
        return Subject(name=name, config=_train_config(path).model, stored_as="float32", source=str(path))
    raise UsageError(f"{path} has neither model_type (Hugging Face) nor model (a run); is it a model's config.json?")


def _train_config(path: Path) -> TrainConfig:
    def start_values(init_from: str) -> dict[str, Any]:
        from moesaic.checkpoint.adapters import start_values  # which imports torch

        return start_values(init_from)

    return read_train_config(path, (), start_values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds a JSON {type(values).__name__}, not an object")
    return values


def _from_hugging_face(path: Path, values: dict[str, Any]) -> ModelConfig:
    from moesaic.checkpoint.families import family_of  # brings torch, which nothing else here needs

    try:
        return family_of(values["model_type"]).config_from_hf(values)
    except MoesaicError as error:
        raise UsageError(f"{path}: {error}") from error


def _stored_as(values: dict[str, Any]) -> str:
    """The type of the weights, as far as config.json tells."""
    packed = values.get("quantization_config")
    method = packed.get("quant_method") if isinstance(packed, dict) else None
    stored = {"mxfp4": "mxfp4", "fp8": "float8"}.get(str(method))
    named = str(values.get("dtype") or values.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return stored or (named if named in ("float32", "bfloat16", "float16") else "bfloat16")
