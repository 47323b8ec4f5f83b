"""The saved states of a run: written whole, checked on every load, thinned without ever losing the last good one.

RUN/states/step-00000100/ holds one safetensors file per group of tensors (model, optimizer, ...), state.json, and last
manifest.json with the size and SHA-256 of each. A state that does not match its manifest in every byte is never loaded.
Several ranks write one together, each what it holds; `state_pieces` says how that looks, and it loads all the same.
"""

import hashlib
import json
import re
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from torch._C._distributed_c10d import Store

from moesaic.checkpoint.state_pieces import Rows, StateTensors, write_pieces
from moesaic.errors import MoesaicError, UsageError
from moesaic.weight_reader import read_safetensors
from moesaic.weights_io import (
    FileDigest,
    atomic_directory,
    read_json,
    sha256_of,
    write_bytes,
    write_json,
    write_safetensors,
)

STATES = "states"
MANIFEST = "manifest.json"
STATE = "state.json"
T = TypeVar("T")
DIRECTORY_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class RunState:
    """A verified state. `warnings` says, one line each, which newer states were passed over and why."""

    step: int
    directory: Path
    extra: dict[str, Any]
    warnings: tuple[str, ...] = ()

    def value(self, key: str) -> Any:
        """`extra[key]`; MoesaicError when the state has none, as those of other versions may."""
        if key not in self.extra:
            raise MoesaicError(f"{self.directory / STATE} has no {key}: another version wrote it; train it again")
        return self.extra[key]

    def load_tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors saved as "<group>.<name>", by name, whole; empty when there were none."""
        path = self.directory / f"{group}.safetensors"
        if path.exists():
            return read_safetensors(path)
        with self.open_tensors(group) as stored:
            return {name: stored.read(name) for name in sorted(stored.shapes)}

    def open_tensors(self, group: str) -> StateTensors:
        """The same, of which parts are then read."""
        return StateTensors(self.directory, group)


def save_run_state(
    run_directory: Path, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Writes the state of `step`, reads it back, and only then removes what is older than the newest `keep` good ones.

    Tensor names are "<group>.<name>"; each group becomes one file. `extra` is JSON. An old state of `step` is replaced.

    Raises MoesaicError, with everything on disk as it was, when the disk is full.
    """
    directory = _directory(run_directory, step)
    bytes_needed = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_directory(directory, bytes_needed=bytes_needed) as temporary:
        digests = {}
        for group, members in _grouped(tensors).items():
            file_name = f"{group}.safetensors"
            digests[file_name] = write_safetensors(temporary / file_name, members)
        digests[STATE] = write_json(temporary / STATE, {"step": step, "extra": extra})
        write_bytes(temporary / MANIFEST, _manifest_bytes(digests))
    if problem := find_problem(directory):
        raise MoesaicError(f"{directory} was written but does not read back ({problem}); check the disk")
    _thin_out(run_directory, step, keep)
    return directory


@dataclass(frozen=True)
class Crew:
    """The ranks that write a state together: this one's index, their count, and an empty store that all see."""

    store: Store
    index: int
    count: int


def save_pieces(
    run_directory: Path, step: int, tensors: Mapping[str, Rows], extra: Mapping[str, Any], crew: Crew, *, keep: int = 2
) -> None:
    """`save_run_state` by several ranks, each of which calls it with what it holds. `run_directory` is shared by all.

    Returns when the state is on the disk, under its name and verified; nobody sees it before. Needs no memory beyond
    `tensors`, on any rank, and no exchange, so a thread may do it.

    Raises MoesaicError on all ranks, with everything on disk as it was, when one of them cannot write.
    """
    groups = _grouped(tensors)
    if crew.index > 0:
        _join_save(_directory(run_directory, step), groups, crew)
        return
    outcome = "it was interrupted"
    try:
        _lead_save(_directory(run_directory, step), step, groups, extra, crew)
        _thin_out(run_directory, step, keep)
        outcome = ""
    except MoesaicError as error:
        outcome = str(error)
        raise
    finally:
        if outcome:
            crew.store.set("directory", "")
        crew.store.set("outcome", outcome)


def _lead_save(
    directory: Path, step: int, groups: Mapping[str, Mapping[str, Rows]], extra: Mapping[str, Any], crew: Crew
) -> None:
    # All ranks hold about as much as this one.
    needed = crew.count * sum(part.tensor.nbytes for parts in groups.values() for part in parts.values())
    with atomic_directory(directory, bytes_needed=needed) as temporary:
        crew.store.set("directory", temporary.name)
        digests = write_pieces(temporary, groups, crew.index, crew.count)
        digests[STATE] = write_json(temporary / STATE, {"step": step, "extra": extra})
        for rank in range(1, crew.count):
            answer = json.loads(_wait_for(crew.store, f"written/{rank}"))
            if "error" in answer:
                raise MoesaicError(f"the state of step {step} was not saved, older ones are whole: {answer['error']}")
            digests |= {name: FileDigest(*digest) for name, digest in answer.items()}
        write_bytes(temporary / MANIFEST, _manifest_bytes(digests))
    if problem := find_problem(directory, contents=False):
        raise MoesaicError(f"{directory} was written but does not read back ({problem}); check the disk")


def _join_save(directory: Path, groups: Mapping[str, Mapping[str, Rows]], crew: Crew) -> None:
    name = _wait_for(crew.store, "directory")
    if name:
        answer: dict[str, Any] = {}
        try:
            digests = write_pieces(directory.with_name(name), groups, crew.index, crew.count)
            answer = {file: [digest.size, digest.sha256] for file, digest in digests.items()}
        except (OSError, MoesaicError) as error:
            answer = {"error": f"rank {crew.index} on {socket.gethostname()}: {error}"}
        finally:
            crew.store.set(f"written/{crew.index}", json.dumps(answer or {"error": f"rank {crew.index} has failed"}))
    if outcome := _wait_for(crew.store, "outcome"):
        raise MoesaicError(outcome)


def _wait_for(store: Store, key: str) -> str:
    store.wait([key], timedelta(days=365))  # should its writer be lost, this process will be ended
    return store.get(key).decode()


def _directory(run_directory: Path, step: int) -> Path:
    return run_directory / STATES / f"step-{step:08d}"


def _grouped(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    groups: dict[str, dict[str, T]] = {}
    for full_name, tensor in tensors.items():
        group, _, name = full_name.partition(".")
        groups.setdefault(group, {})[name] = tensor
    return groups


def newest_run_state(run_directory: Path) -> RunState:
    """The newest state that verifies.

    Raises UsageError when nothing was ever saved, MoesaicError when every state is damaged.
    """
    steps = list_steps(run_directory)
    if not steps:
        raise UsageError(f"{run_directory} holds no saved state; train it first, without --resume")
    problems = []
    for step, directory in sorted(steps.items(), reverse=True):
        problem = find_problem(directory)
        if problem is None:
            extra = read_json(directory / STATE)["extra"]
            warnings = tuple(f"{problem}; going back to step {step}" for problem in problems)
            return RunState(step, directory, extra, warnings)
        problems.append(f"the state of step {step} is damaged ({problem})")
    raise MoesaicError(
        f"{run_directory / STATES} holds no usable state: {'; '.join(problems)}; restore one from a copy or train anew"
    )


def run_state_at(run_directory: Path, step: int) -> RunState:
    """A state that another rank has verified."""
    directory = _directory(run_directory, step)
    return RunState(step, directory, read_json(directory / STATE)["extra"])


def list_steps(run_directory: Path) -> dict[int, Path]:
    """Directories of all states by step, oldest first, verified or not."""
    found = {}
    for path in (run_directory / STATES).glob("step-*"):
        if match := DIRECTORY_NAME.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def find_problem(directory: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a state: the file and the reason. None when every byte is as it was written.

    Without `contents` only the manifest, the sizes and the step are looked at.
    """
    try:
        files = _read_manifest(directory / MANIFEST)
        for name, (size, sha256) in files.items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if contents and sha256_of(path) != sha256:
                return f"{name} has the wrong SHA-256"
        step = read_json(directory / STATE)["step"]
    except MoesaicError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return None if directory.name == f"step-{step:08d}" else f"{STATE} is of step {step}"


def _thin_out(run_directory: Path, saved_step: int, keep: int) -> None:
    """Removes states older than the newest `keep` good ones, and damaged ones that the saved step overtook.

    A damaged state of a later step is what a resumed run had to pass over; an undamaged one is not ours to judge.
    """
    directories = list_steps(run_directory)
    older = [step for step in directories if step < saved_step]
    good = 1
    for step in reversed(older):
        if good >= keep:
            shutil.rmtree(directories[step], ignore_errors=True)
        elif find_problem(directories[step]) is None:
            good += 1
    for step, directory in directories.items():
        if step > saved_step and find_problem(directory):
            shutil.rmtree(directory, ignore_errors=True)


def _manifest_bytes(digests: Mapping[str, FileDigest]) -> bytes:
    """The manifest in its only valid spelling. Its own SHA-256 makes a flipped byte in it visible."""
    files = {name: [digest.size, digest.sha256] for name, digest in digests.items()}
    return _canonical({"files": files, "sha256": hashlib.sha256(_canonical(files)).hexdigest()})


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    if not path.is_file():
        raise MoesaicError(f"{MANIFEST} is missing")
    manifest = read_json(path)
    files = manifest.get("files")
    intact = (
        isinstance(files, dict)
        and STATE in files
        and manifest.get("sha256") == hashlib.sha256(_canonical(files)).hexdigest()
        and path.read_bytes() == _canonical(manifest)
    )
    if not intact:
        raise MoesaicError(f"{MANIFEST} does not match its own SHA-256")
    assert isinstance(files, dict)
    return files


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
