"""What a user means by MODEL: a run directory, a Hugging Face directory, or a model on the hub."""

import difflib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moesaic.checkpoint.run_state import STATES
from moesaic.errors import MoesaicError, UsageError
from moesaic.weights_io import read_json

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
NOT_HUB_FILES = ["*/*.safetensors", "*/*.json", "*/tokenizer.model", "*/*.txt", "consolidated*.safetensors"]
"""Some repositories hold the same weights again, for other programs."""
HUB_SECONDS = 10.0
"""How long the hub may be silent before it counts as unreachable."""
CONFIG = "config.json"


@dataclass(frozen=True)
class ModelSource:
    """A directory that holds a model: `run` as training leaves it, `hf` as transformers writes it.

    `hub_id` is the name it has on the hub, when it came from there.
    """

    kind: Literal["run", "hf"]
    directory: Path
    hub_id: str | None = None

    @property
    def config_path(self) -> Path:
        return self.directory / CONFIG


def resolve_model(path: str | Path | ModelSource, revision: str | None = None, offline: bool = False) -> ModelSource:
    """Finds the directory of MODEL, downloading it when it is a hub id. Weights are only ever taken as safetensors.
    What was found before is taken as it is: who loads several parts of a model asks the hub once.

    Args:
        revision: branch, tag or commit of a model on the hub; None is its main branch.
        offline: take a model of the hub from the local cache, and ask nobody.

    Raises UsageError when `path` is none of the three, MoesaicError when the hub cannot be reached, or when the model
    is not in the local cache and `offline` is set.
    """
    if isinstance(path, ModelSource):
        return path
    directory = Path(os.path.expanduser(path))  # leaves ~nobody as it is, where Path.expanduser raises RuntimeError
    if directory.is_dir():
        if revision is not None:
            raise UsageError(f"{path} is a directory here, which has no revision {revision}; leave the revision out")
        return _inspect(directory)
    if directory.exists():
        raise UsageError(f"{path} is a file; MODEL is the directory that holds config.json and the weights")
    # "runs/dmeo" looks like a hub id too; beside an existing "runs" it is a misspelt path.
    if HUB_ID.fullmatch(str(path)) and not directory.parent.exists():
        snapshot = _download(str(path), revision, offline)
        if not (snapshot / CONFIG).is_file():
            raise _incomplete(str(path), CONFIG, offline)
        return replace(_inspect(snapshot), hub_id=str(path))
    raise UsageError(
        f"{path} is neither a run directory, a Hugging Face directory nor a hub id such as Qwen/Qwen3-0.6B"
        f"{_suggestion(directory)}"
    )


def require_weights(source: ModelSource, offline: bool = False) -> None:
    """Raises MoesaicError when a model of the hub came without its weights: a download was cut short, or has none."""
    if source.hub_id is None:
        return
    index = source.directory / "model.safetensors.index.json"
    shards = read_json(index).get("weight_map") if index.is_file() else None
    names = {str(name) for name in shards.values()} if isinstance(shards, dict) else {"model.safetensors"}
    missing = sorted(name for name in names if not (source.directory / name).is_file())
    if missing:
        raise _incomplete(source.hub_id, missing[0], offline)


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

    with _quiet_hub_library():
        silent = not offline and _is_silent(hub_id, revision)
        try:
            return Path(
                snapshot_download(
                    hub_id,
                    revision=revision,
                    allow_patterns=HUB_FILES,
                    ignore_patterns=NOT_HUB_FILES,
                    local_files_only=offline or silent,
                    tqdm_class=_bars_on_terminals(),
                )
            )
        except Exception as error:  # the HTTP client under the hub library has errors of its own
            silence = f"no answer in {HUB_SECONDS:g} s" if silent else None
            raise _hub_error(error, hub_id, revision, offline, silence) from error


def _is_silent(hub_id: str, revision: str | None) -> bool:
    """Whether the hub lets requests wait; the first one of snapshot_download would wait for ever."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(hub_id, revision=revision, timeout=HUB_SECONDS)
    except Exception as error:  # any other failure is for snapshot_download to meet again
        return "Timeout" in type(error).__name__  # of an HTTP client that is not the same in all versions
    return False


def _hub_error(error: Exception, hub_id: str, revision: str | None, offline: bool, silence: str | None) -> MoesaicError:
    """What an exception of the hub library means for a user, in one line."""
    from huggingface_hub import errors

    where = hub_id if revision is None else f"revision {revision} of {hub_id}"
    match error:
        case errors.HFValidationError():
            return UsageError(f"{hub_id} is not a path here and not a possible hub id; check the name")
        case errors.GatedRepoError():
            return UsageError(
                f"{hub_id} is only for those who accepted its terms; accept them on its page of the hub, "
                "then log in here with: hf auth login"
            )
        case errors.RepositoryNotFoundError() | errors.RevisionNotFoundError():
            return UsageError(
                f"{where} is not a path here and not on the hub, or needs a login; check the name, or: hf auth login"
            )
        case errors.LocalEntryNotFoundError() if offline:
            part = " in full" if hasattr(error, "snapshot_path") else ""
            return MoesaicError(
                f"{where} is not a path here, not{part} in the local cache, and was not looked for on the hub; "
                "run once without --offline"
            )
        case errors.LocalEntryNotFoundError():
            reason = silence or _first_line(error.__cause__ or error)
            return MoesaicError(
                f"{where} is not a path here, not in the local cache, and the hub cannot be reached ({reason}); "
                "check the network, or copy the model here and name its directory"
            )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return MoesaicError(
            f"{where}: the hub refused this login ({_first_line(error)}); log in anew with: hf auth login"
        )
    return MoesaicError(f"{where} could not be downloaded from the hub: {_first_line(error)}; try again")


def _incomplete(hub_id: str, missing: str, offline: bool) -> MoesaicError:
    if offline:
        return MoesaicError(
            f"{hub_id} is in the local cache only in part: {missing} is missing; run once without --offline"
        )
    return MoesaicError(
        f"{hub_id} has no {missing} on the hub, or its download was cut short; only models in the form of transformers "
        "with safetensors are read; try again, or choose another"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).split("\n")
    return lines[0].strip().rstrip(".:;") or type(error).__name__


@contextmanager
def _quiet_hub_library() -> Iterator[None]:
    """Its warnings, about retries and logins, would stand above the one line that says what to do."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _bars_on_terminals() -> type:
    from huggingface_hub.utils import tqdm

    class Bars(tqdm):
        """Its bars, drawn on standard error where that is a terminal."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": options.get("disable")})

    return Bars


def _suggestion(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; {path.parent} does not exist"
    siblings = {entry.name: entry for entry in path.parent.iterdir() if entry.is_dir()}
    nearest = difflib.get_close_matches(path.name, siblings, n=3)
    return f"; did you mean {' or '.join(str(siblings[name]) for name in nearest)}?" if nearest else ""
