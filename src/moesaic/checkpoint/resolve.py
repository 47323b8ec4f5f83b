"""What a user means by MODEL: a run directory, a Hugging Face directory, or a model on the hub."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moesaic.checkpoint.run_state import STATES
from moesaic.errors import MoesaicError, UsageError
from moesaic.weights_io import read_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.txt"]
CONFIG = "config.json"


@dataclass(frozen=True)
class ModelSource:
    """A directory that holds a model: `run` as training leaves it, `hf` as transformers writes it."""

    kind: Literal["run", "hf"]
    directory: Path

    @property
    def config_path(self) -> Path:
        return self.directory / CONFIG


def resolve_model(path: str | Path, revision: str | None = None, offline: bool = False) -> ModelSource:
    """Finds the directory of MODEL, downloading it when it is a hub id. Weights are only ever taken as safetensors.

    Raises UsageError when `path` is none of the three, MoesaicError when the hub cannot be reached.
    """
    directory = Path(path).expanduser()
    if directory.is_dir():
        return _inspect(directory)
    if directory.exists():
        raise UsageError(f"{path} is a file; MODEL is the directory that holds config.json and the weights")
    # "runs/dmeo" looks like a hub id too; beside an existing "runs" it is a misspelt path.
    if HUB_ID.fullmatch(str(path)) and not directory.parent.exists():
        return _inspect(_download(str(path), revision, offline))
    raise UsageError(
        f"{path} is neither a run directory, a Hugging Face directory nor a hub id such as Qwen/Qwen3-0.6B"
        f"{_suggestion(directory)}"
    )


def _inspect(directory: Path) -> ModelSource:
    if not (directory / CONFIG).is_file():
        runs = [str(path.parent) for path in sorted(directory.glob(f"*/{STATES}")) if path.is_dir()]
        if runs:
            raise UsageError(f"{directory} holds runs: {', '.join(runs)}; name one")
        raise UsageError(f"{directory} has no {CONFIG}, so it is neither a run nor a Hugging Face directory")
    config = read_json(directory / CONFIG)
    if "model_type" in config:
        return ModelSource("hf", directory)
    if "model" in config:
        return ModelSource("run", directory)
    raise MoesaicError(f"{directory / CONFIG} has neither model_type (Hugging Face) nor model (a run); is it a model?")


def _download(hub_id: str, revision: str | None, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=HUB_FILES, local_files_only=offline))
    except HFValidationError as error:
        raise UsageError(f"{hub_id} is not a path here and not a possible hub id; check the name") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = f"revision {revision} of {hub_id}" if isinstance(error, RevisionNotFoundError) else hub_id
        raise UsageError(f"{what} is not a path here and not on the hub, or needs a login; check the name") from error
    except LocalEntryNotFoundError as error:
        raise MoesaicError(
            f"{hub_id} is not a path here, not in the local cache, and the hub cannot be reached; "
            "check the network, or copy the model here and name its directory"
        ) from error
    except Exception as error:  # the HTTP client under the hub library has errors of its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MoesaicError(f"{hub_id} could not be downloaded from the hub: {reason}; try again") from error


def _suggestion(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; {path.parent} does not exist"
    siblings = {entry.name: entry for entry in path.parent.iterdir() if entry.is_dir()}
    nearest = difflib.get_close_matches(path.name, siblings, n=3)
    return f"; did you mean {' or '.join(str(siblings[name]) for name in nearest)}?" if nearest else ""
