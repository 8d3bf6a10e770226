"""Run id and version id: one sha256 over everything a trained model is made of.

    run_id      data, code, config, kernels, environment      known when training starts
    version_id  the same and the weights                      known at export; a server only reads it

Each part is a small JSON document (or a digest) that holds no path, host or device, so the same
work has the same id on another machine; the parts are kept beside the id and say what differs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpuops.errors import GpuopsError, InputError, UnavailableError

RUN_PARTS = ("data", "code", "config", "kernels", "environment")
"""What a run id covers; a version id covers these and `weights`."""

RUN_FILE = "run.json"
"""File of a run directory that holds its run id and all that it is made of."""

PLACE_KEYS = (
    frozenset({"accelerator", "device", "devices", "num_nodes", "strategy", "host", "hostname", "port", "url", "uri"})
    | {"config", "ckpt_path", "default_root_dir", "dir", "dirpath", "path"}
    | {"logger", "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler"}
)
"""Config keys that say where a run happened and who watched it, not what was computed; dropped at every depth.

`config` is dropped only where it names config files: a model's own mapping of that name stays.
"""

PLACE_SUFFIXES = ("_dir", "_host", "_url", "_uri")
"""Endings of further such keys. Not `_path`: a `class_path` names what is computed."""

_PLACE_VALUE = re.compile(r"/|~|[A-Za-z]:[\\/]|[A-Za-z][A-Za-z0-9+.-]*://")
_GIT_TIMEOUT_S = 60
# Everything that a user's Git settings could change in the bytes of a diff.
_DIFF_OPTIONS = (
    "--binary --full-index --no-color --no-ext-diff --no-textconv --no-renames --unified=3 --inter-hunk-context=0 "
    "--diff-algorithm=myers --indent-heuristic --src-prefix=a/ --dst-prefix=b/ -O/dev/null --submodule=short "
    "--ignore-submodules=none"
)


def canonical_json(document: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no blanks: equal documents give equal bytes.

    Mappings and tuples count as objects and arrays; `json.loads` of the bytes has the same canonical form.

    Raises:
        InputError: something JSON cannot hold exactly, such as NaN or a key that is not a string, named by its place.
    """
    try:
        plain = _plain(document, "document")
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    except RecursionError:
        raise InputError("the document is nested too deeply, or holds itself: give it as flat JSON") from None
    except GpuopsError:
        raise
    except ValueError as error:  # a lone surrogate, or an integer of thousands of digits
        raise InputError(f"the document cannot be written as JSON ({error}): give text and numbers") from None


def _plain(value: Any, place: str) -> Any:
    """`value` as plain JSON types, or InputError naming its place."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InputError(f"{place} is {value}, which JSON cannot hold: write it as null or as text")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{place} has the key {key!r}, JSON keys are text: write it as {str(key)!r}")
        return {key: _plain(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
    raise InputError(f"{place} is a {type(value).__name__}, which JSON cannot hold: convert it to text, number or list")


def digest(document: Any) -> str:
    """Hex sha256 of a document's canonical JSON."""
    return _sha256(canonical_json(document))


def run_id(identity: Mapping[str, Any]) -> str:
    """Id of a run: digest of its data, code, config, kernels and environment; other keys are ignored.

    Raises:
        InputError: a part is missing or null.
    """
    return digest({part: _part(identity, part) for part in RUN_PARTS})


def version_id(identity: Mapping[str, Any], weights: str) -> str:
    """Id of a model version: digest of the parts of its run and of `weights_identity` of its weights.

    Raises:
        InputError: a part is missing or null, or `weights` is empty.
    """
    parts = {**identity, "weights": weights}
    return digest({part: _part(parts, part) for part in (*RUN_PARTS, "weights")})


def _part(identity: Mapping[str, Any], part: str) -> Any:
    value = identity.get(part)
    if value is None or value == "":
        raise InputError(f"the identity has no {part}: an id covers {', '.join(RUN_PARTS)} (and weights), none unknown")
    return value


def code_identity(user_module: Path | None, root: Path | None) -> dict[str, Any]:
    """What code ran: the user's repository, the user's module and gpuops itself.

    Args:
        user_module: File that defines the user's model, or None if the model is a library's own.
        root: Folder in which Git is asked when there is no user module, such as the config file's.

    Returns:
        `commit` (or None, with `reason`), `dirty` (sha256 of what differs from it: the diff and every untracked .py
        file; None if nothing does), `gpuops` (sha256 of its sources), `module` (sha256 of the file). No paths.
    """
    if user_module is not None and not user_module.is_file():
        raise InputError(f"{user_module} is not a file: give the .py file that defines the model")
    folder = user_module.resolve().parent if user_module is not None else root
    commit, dirty, reason = _git_state(folder)
    return {
        "commit": commit,
        "reason": reason,
        "dirty": dirty,
        "gpuops": _sources_sha256("gpuops", "gpuops_serving"),
        "module": None if user_module is None else _sha256(user_module.read_bytes()),
    }


def kernels_identity() -> str:
    """Hex sha256 of the sources of gpuops_kernels, which is looked up but not imported (it needs torch)."""
    return _sources_sha256("gpuops_kernels")


def environment_identity() -> dict[str, Any]:
    """Python's minor version, and name and version of every installed package that gpuops depends on.

    All extras of gpuops are followed; a requirement counts if it is installed. Environment markers other than
    `extra` are not evaluated: what a marker excludes is normally not installed, and the answer must not depend on
    whether a marker parser is. Where gpuops is on PYTHONPATH only, every installed package counts and `reason` says so.
    """
    installed: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        # A half-removed package has a folder and no metadata; the first of a name on sys.path is the one imported.
        if name := _name(distribution):
            installed.setdefault(_normal(name), distribution)
    environment: dict[str, Any] = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    names: set[str] = set(installed)
    if "gpuops" in installed:
        names = _closure(installed, "gpuops")
    else:
        environment["reason"] = "gpuops is not installed as a distribution: every installed package counts"
    # gpuops' own code is in the code identity, byte for byte.
    environment["packages"] = {name: installed[name].version for name in sorted(names - {"gpuops"})}
    return environment


def weights_identity(weights: Iterable[tuple[str, str, tuple[int, ...], bytes]]) -> str:
    """Hex sha256 over weights given as (name, dtype, shape, bytes), in any order.

    Each entry's bytes are hashed as they come, so a generator needs memory for one entry only.

    Raises:
        InputError: no weights, or a name that occurs twice.
    """
    entries: dict[str, list[Any]] = {}
    for name, dtype, shape, content in weights:
        if name in entries:
            raise InputError(f"weight {name!r} is given twice: give each name once")
        entries[name] = [dtype, list(shape), _sha256(content)]
    if not entries:
        raise InputError("a model without weights has no version: give its parameters and buffers")
    return digest(entries)


def config_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved config without what says where it ran: `PLACE_KEYS`, `PLACE_SUFFIXES` and values that are places.

    A place is a path object, an absolute path (also `~` or a drive) or a URL; relative paths stay unless their key says
    what they are. Two configs that differ in nothing else have the same identity.
    """
    kept: dict[str, Any] = _without_places(config)
    return kept


def _without_places(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_places(v) for k, v in value.items() if not (_is_place_key(k, v) or _is_place(v))}
    if isinstance(value, list | tuple):
        return [_without_places(item) for item in value if not _is_place(item)]
    return value


def _is_place_key(key: Any, value: Any) -> bool:
    if key == "config" and isinstance(value, Mapping):
        return False
    return key in PLACE_KEYS or str(key).endswith(PLACE_SUFFIXES)


def _is_place(value: Any) -> bool:
    return isinstance(value, os.PathLike) or (isinstance(value, str) and _PLACE_VALUE.match(value) is not None)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sources_sha256(*packages: str) -> str:
    """Digest of {package/file.py: sha256}; a package that is not on sys.path adds nothing, but one must be."""
    sources: dict[str, str] = {}
    for package in packages:
        spec = find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            root = Path(folder)
            for file in root.rglob("*.py"):
                sources[f"{package}/{file.relative_to(root).as_posix()}"] = _sha256(file.read_bytes())
    if not sources:
        raise UnavailableError(f"no sources of {' or '.join(packages)} on sys.path: install gpuops, or mend PYTHONPATH")
    return digest(sources)


def _git_state(folder: Path | None) -> tuple[str | None, str | None, str | None]:
    """(commit, dirty, reason) of the repository around `folder`.

    Reasons are our own words: Git's are translated and hold paths.
    """
    if folder is None:
        return None, None, "no user module: the model is not in a repository of the user's"
    try:
        top = Path(os.fsdecode(_git(folder, "rev-parse", "--show-toplevel").removesuffix(b"\n")))
    except OSError:
        return None, None, "git could not be run"
    except subprocess.SubprocessError:
        return None, None, "not a readable Git repository"
    reason = None
    try:
        try:
            commit = base = _git(top, "rev-parse", "--verify", "--quiet", "HEAD^{commit}").decode().strip()
        except subprocess.CalledProcessError:
            commit, reason = None, "the repository has no commit yet"
            base = _git(top, "hash-object", "-t", "tree", "--stdin").decode().strip()  # the empty tree
        diff = _git(top, "diff", base, *_DIFF_OPTIONS.split())
        listed = _git(top, "ls-files", "--others", "--exclude-standard", "-z", "--", "*.py")
        untracked = {
            name.decode(errors="backslashreplace"): _sha256((top / os.fsdecode(name)).read_bytes())
            for name in listed.split(b"\0")
            if name and (top / os.fsdecode(name)).is_file()
        }
    except (OSError, subprocess.SubprocessError):
        return None, None, "Git could not compare the work tree with its commit"
    dirty = digest({"diff": _sha256(diff), "untracked": untracked}) if diff or untracked else None
    return commit, dirty, reason


def _git(folder: Path, *arguments: str) -> bytes:
    # Inside a Git hook these name another repository. Optional locks would make a read-only question write the index.
    environment = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    command = ["git", "-C", str(folder), *arguments]
    done = subprocess.run(
        command, capture_output=True, stdin=subprocess.DEVNULL, env=environment, timeout=_GIT_TIMEOUT_S, check=True
    )
    return done.stdout


def _name(distribution: metadata.Distribution) -> str | None:
    """Name of a distribution; None if its metadata is gone.

    The backport importlib_metadata, once anything imports it, answers for the standard library and raises there.
    """
    try:
        found = distribution.metadata
    except FileNotFoundError:
        return None
    if "Name" not in found:
        return None
    return found["Name"]


def _normal(name: str) -> str:
    """PEP 503: names that pip takes for the same become equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _closure(installed: Mapping[str, metadata.Distribution], start: str) -> set[str]:
    """Installed names reachable from `start` with all its extras."""
    extras = installed[start].metadata.get_all("Provides-Extra") or []
    todo = [(start, frozenset(map(_normal, extras)))]
    done = set(todo)
    while todo:
        name, wanted = todo.pop()
        reached = {need for need in _requirements(installed[name], wanted) if need[0] in installed} - done
        done |= reached
        todo.extend(reached)
    return {name for name, _ in done}


def _requirements(distribution: metadata.Distribution, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """(name, extras) of each requirement that applies when `extras` of this distribution are asked for."""
    for line in distribution.requires or ():
        requirement, _, marker = line.partition(";")
        of_extra = set(map(_normal, re.findall(r"extra\s*==\s*['\"]([^'\"]+)", marker)))
        found = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?", requirement)
        if found and (not of_extra or of_extra & extras):
            asked = (found[2] or "").split(",")
            yield _normal(found[1]), frozenset(_normal(extra.strip()) for extra in asked if extra.strip())
