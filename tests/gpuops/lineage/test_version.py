"""Ids: the same for the same work, wherever it ran; different for any difference in what was computed."""

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuops.errors import InputError, UnavailableError
from gpuops.lineage import version
from gpuops.lineage.version import (
    RUN_PARTS,
    canonical_json,
    code_identity,
    config_identity,
    digest,
    environment_identity,
    kernels_identity,
    run_id,
    version_id,
    weights_identity,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
IDENTITY = {
    "data": {"fingerprint": "f" * 64, "snapshot": "S1"},
    "code": {"commit": "c0", "reason": None, "dirty": None, "gpuops": "g", "module": "m"},
    "config": {"seed_everything": 1, "model": {"lr": 0.1}},
    "kernels": "k" * 64,
    "environment": {"python": "3.11", "packages": {"numpy": "2.0"}},
}


def shuffled(value: Any, order: random.Random) -> Any:
    """The same document with its keys in another order."""
    if isinstance(value, dict):
        keys = list(value)
        order.shuffle(keys)
        return {key: shuffled(value[key], order) for key in keys}
    return [shuffled(item, order) for item in value] if isinstance(value, list) else value


# canonical JSON


@given(json_values, st.randoms(use_true_random=False))
def test_key_order_does_not_matter_and_json_reads_it_back(value: Any, order: random.Random) -> None:
    assert canonical_json(shuffled(value, order)) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value
    assert canonical_json(json.loads(canonical_json(value))) == canonical_json(value)


def test_form() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": "Å\n"}) == '{"a":"Å\\n","b":[1,2.5,null,true]}'.encode()
    assert canonical_json(MappingProxyType({"a": (1,)})) == b'{"a":[1]}'
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [float("nan")]}, r"document\.a\[0\] is nan"),
        ({"a": float("inf")}, r"document\.a is inf"),
        ({"a": {1: 2}}, r"document\.a has the key 1"),
        ({"a": Path("/x")}, r"document\.a is a PosixPath"),
        ({"a": b"x"}, "is a bytes"),
        ("\ud800", "cannot be written"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_its_place(value: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        canonical_json(value)


def test_a_document_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InputError, match="nested"):
        canonical_json(loop)


# run id and version id


def test_ids_change_with_every_part_and_with_nothing_else() -> None:
    weights = weights_identity([("w", "float32", (1,), b"1234")])
    ids = {run_id(IDENTITY), version_id(IDENTITY, weights), version_id(IDENTITY, "0" * 64)}
    for part in RUN_PARTS:
        changed = {**IDENTITY, part: "another"}
        ids |= {run_id(changed), version_id(changed, weights)}
    assert len(ids) == 3 + 2 * len(RUN_PARTS)
    assert run_id({**IDENTITY, "note": "seen", "weights": weights}) == run_id(IDENTITY)


@given(st.data())
def test_an_id_changes_with_any_leaf(data: st.DataObject) -> None:
    changed: Any = copy.deepcopy(IDENTITY)
    place = changed
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict):
            break
        place = place[key]
    place[key] = data.draw(json_values.filter(lambda value: value is not None and value != place[key]))
    if isinstance(place[key], str) and place[key] == "":
        return
    assert run_id(changed) != run_id(IDENTITY)
    assert version_id(changed, "w") != version_id(IDENTITY, "w")


@given(st.randoms(use_true_random=False))
def test_an_id_does_not_change_with_key_order(order: random.Random) -> None:
    assert run_id(shuffled(IDENTITY, order)) == run_id(IDENTITY)
    assert version_id(shuffled(IDENTITY, order), "w") == version_id(IDENTITY, "w")


@pytest.mark.parametrize("part", RUN_PARTS)
@pytest.mark.parametrize("value", ["absent", None, ""])
def test_a_missing_part_is_refused(part: str, value: str | None) -> None:
    identity: dict[str, Any] = {**IDENTITY, part: value}
    if value == "absent":
        del identity[part]
    with pytest.raises(InputError, match=f"no {part}"):
        run_id(identity)
    with pytest.raises(InputError, match=f"no {part}"):
        version_id(identity, "w")


def test_missing_weights_are_refused() -> None:
    with pytest.raises(InputError, match="no weights"):
        version_id({**IDENTITY, "weights": "w"}, "")


# config

CONFIG: dict[str, Any] = {
    "seed_everything": 1,
    "trainer": {"max_epochs": 3, "precision": "bf16-mixed"},
    "model": {"class_path": "my.Model", "init_args": {"lr": 1e-3, "config": {"depth": 3}, "dims": [1, 2]}},
    "data": {"init_args": {"batch": 8, "variables": ["turbidity"], "relative": "a/b"}},
}
places = st.sampled_from(["/data/x", "~/x", "s3://b/k", "file:///x", "C:\\x", Path("/x"), PurePosixPath("rel")])
place_keys = st.sampled_from([*sorted(version.PLACE_KEYS), "log_dir", "store_url", "db_host", "tracking_uri"])


@given(st.lists(st.tuples(place_keys, st.integers() | st.text() | places), max_size=6), places, st.data())
def test_where_it_ran_does_not_change_the_id(added: list[tuple[str, Any]], place: Any, data: st.DataObject) -> None:
    config = copy.deepcopy(CONFIG)
    for key, value in added:
        at = data.draw(st.sampled_from([config, config["trainer"], config["model"]["init_args"]]))
        if not (key == "config" and at is config["model"]["init_args"]):
            at[key] = value
    config["data"]["init_args"]["root"] = place
    config["data"]["init_args"]["variables"].append(place)
    assert config_identity(config) == CONFIG
    assert run_id({**IDENTITY, "config": config_identity(config)}) == run_id({**IDENTITY, "config": CONFIG})


@given(st.sampled_from(["max_epochs", "precision", "new"]), st.integers() | st.text(alphabet="abc"))
def test_what_was_computed_changes_the_id(key: str, value: Any) -> None:
    changed = {**CONFIG, "trainer": {**CONFIG["trainer"], key: value}}
    assert (digest(config_identity(changed)) == digest(config_identity(CONFIG))) == (changed == CONFIG)


def test_config_is_left_as_it_was_and_what_is_kept_is_documented() -> None:
    config = {
        "config": ["/a/run.yaml"],
        "trainer": {
            "devices": 8,
            "logger": {"class_path": "L"},
            "callbacks": [{"init_args": {"dirpath": "x", "k": 1}}],
        },
        "model": {"class_path": "m.M", "init_args": {"config": {"depth": 2}}},
    }
    before = copy.deepcopy(config)
    assert config_identity(config) == {
        "trainer": {"callbacks": [{"init_args": {"k": 1}}]},
        "model": {"class_path": "m.M", "init_args": {"config": {"depth": 2}}},
    }
    assert config == before


# weights


def test_weights_identity_sees_name_dtype_shape_and_bytes_but_not_order() -> None:
    a, b = ("a", "float32", (2, 1), b"12345678"), ("b", "float32", (1,), b"abcd")
    same = weights_identity(iter([b, a]))
    assert same == weights_identity([a, b])
    others: list[list[tuple[str, str, tuple[int, ...], bytes]]] = [
        [a],
        [("a", "int32", (2, 1), b"12345678"), b],
        [("a", "float32", (1, 2), b"12345678"), b],
        [("a", "float32", (2, 1), b"12345679"), b],
        [("c", "float32", (2, 1), b"12345678"), b],
        [("a", *b[1:]), ("b", *a[1:])],
        [("a", "float32", (2,), b"1234"), ("b", "float32", (2,), b"5678abcd")],  # the same bytes, cut elsewhere
    ]
    assert len({same, *(weights_identity(other) for other in others)}) == 1 + len(others)


def test_weights_are_refused_twice_or_none() -> None:
    entry = ("w", "float32", (1,), b"1234")
    with pytest.raises(InputError, match="given twice"):
        weights_identity([entry, entry])
    with pytest.raises(InputError, match="without weights"):
        weights_identity([])


# code


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the user's module committed in a subfolder."""
    top = tmp_path / "repo"
    (top / "models").mkdir(parents=True)
    (top / "models" / "net.py").write_text("depth = 1\n")
    (top / "other.txt").write_text("one\n" * 20)
    git(tmp_path, "init", "--quiet", str(top))
    git(top, "add", ".")
    git(top, "commit", "--quiet", "-m", "first")
    return top


def test_a_clean_repository(repository: Path) -> None:
    code = code_identity(repository / "models" / "net.py", None)
    head = subprocess.check_output(["git", "-C", str(repository), "rev-parse", "HEAD"], text=True).strip()
    assert (code["commit"], code["reason"], code["dirty"]) == (head, None, None)
    assert code == code_identity(repository / "models" / "net.py", Path("/"))
    assert {**code, "module": None} == code_identity(None, repository)


def test_every_uncommitted_change_is_seen(repository: Path) -> None:
    module = repository / "models" / "net.py"
    seen = [code_identity(module, None)]
    (repository / "other.txt").write_text("two\n")
    seen.append(code_identity(module, None))
    git(repository, "add", "other.txt")  # staged is still not committed: the same difference
    assert code_identity(module, None) == seen[-1]
    (repository / "helper.py").write_text("x = 1\n")
    seen.append(code_identity(module, None))
    (repository / "helper.py").write_text("x = 2\n")
    seen.append(code_identity(module, None))
    (repository / "helper.py").rename(repository / "renamed.py")
    seen.append(code_identity(module, None))
    module.write_text("depth = 2\n")
    seen.append(code_identity(module, None))
    assert len({code["dirty"] for code in seen}) == len(seen)
    assert len({code["commit"] for code in seen}) == 1
    assert [code["module"] for code in seen].count(seen[0]["module"]) == len(seen) - 1
    (repository / "notes.txt").write_text("not code\n")
    assert code_identity(module, None) == seen[-1]
    assert str(repository) not in json.dumps(seen)


def test_the_same_work_tree_elsewhere_and_under_other_git_settings_has_the_same_identity(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "other.txt").write_text("one\n" * 9 + "two\n" + "one\n" * 10)
    (repository / "new.py").write_text("x = 1\n")
    code = code_identity(repository / "models" / "net.py", None)
    copied = tmp_path / "elsewhere" / "copy"
    shutil.copytree(repository, copied)
    settings = {"diff.noprefix": "true", "diff.context": "0", "core.abbrev": "5", "color.diff": "always"}
    for name, value in {**settings, "diff.external": "false", "diff.relative": "true", "core.pager": "false"}.items():
        git(copied, "config", name, value)
    # As inside a Git hook of another repository.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert code_identity(copied / "models" / "net.py", None) == code


def test_no_commit_yet(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet", ".")
    module = tmp_path / "net.py"
    module.write_text("depth = 1\n")
    first = code_identity(module, None)
    assert (first["commit"], first["reason"]) == (None, "the repository has no commit yet")
    git(tmp_path, "add", ".")
    staged = code_identity(module, None)
    module.write_text("depth = 2\n")
    assert len({first["dirty"], staged["dirty"], code_identity(module, None)["dirty"], None}) == 4


def test_no_repository_no_module_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "net.py"
    module.write_text("depth = 1\n")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    plain = code_identity(module, None)
    assert (plain["commit"], plain["reason"], plain["dirty"]) == (None, "not a readable Git repository", None)
    assert plain["module"] is not None
    assert "no user module" in code_identity(None, None)["reason"]
    monkeypatch.setenv("PATH", "")
    assert code_identity(module, None)["reason"] == "git could not be run"
    with pytest.raises(InputError, match="not a file"):
        code_identity(tmp_path / "missing.py", None)


def package(folder: Path, name: str, files: dict[str, str]) -> None:
    for file, text in files.items():
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_text(text)


def test_kernel_sources_are_read_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gpuops_kernels", raising=False)  # another test may have imported the real one
    files = {"__init__.py": "raise SystemExit('imported')", "a.py": "a", "sub/b.py": "b", "note.txt": "no"}
    seen = []
    for i, change in enumerate([{}, {"note.txt": "yes"}, {"a.py": "A"}, {"sub/b.py": "B"}, {"c.py": ""}]):
        package(tmp_path / str(i), "gpuops_kernels", {**files, **change})
        monkeypatch.setattr(sys, "path", [str(tmp_path / str(i)), *sys.path])
        seen.append(kernels_identity())
    assert seen[0] == seen[1]
    assert len(set(seen)) == 4
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UnavailableError, match="install gpuops"):
        kernels_identity()


def test_gpuops_own_sources_are_in_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gpuops_serving", raising=False)
    before = code_identity(None, None)["gpuops"]
    package(tmp_path, "gpuops_serving", {"__init__.py": "", "server.py": "changed"})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert code_identity(None, None)["gpuops"] != before


# environment


def distribution(folder: Path, name: str, number: str, requires: list[str], extras: list[str]) -> None:
    info = folder / f"{name.replace('-', '_')}-{number}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {number}", *(f"Provides-Extra: {extra}" for extra in extras)]
    (info / "METADATA").write_text(
        "\n".join(["Metadata-Version: 2.1", *lines, *(f"Requires-Dist: {r}" for r in requires)])
    )


def test_the_closure_follows_extras_and_leaves_out_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["Base_Lib>=1", "absent>=1", "gpuops[train]; extra == 'all'", 'tool[Fast.Er,x] (>=2) ; extra == "train"']
    distribution(tmp_path, "gpuops", "0.1", needs, ["all", "train"])
    distribution(tmp_path, "base.lib", "1.0+cpu", ["deep; python_version > '3'"], [])
    distribution(tmp_path, "deep", "4", ["gpuops", "base-lib[loop]"], [])
    distribution(tmp_path, "tool", "2", ["speed; extra == 'fast-er'", "unasked; extra == 'slow'"], ["fast-er", "slow"])
    for name in ("speed", "unasked", "unrelated"):
        distribution(tmp_path, name, "3", [], [])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    environment = environment_identity()
    assert environment["packages"] == {"base-lib": "1.0+cpu", "deep": "4", "speed": "3", "tool": "2"}
    assert list(environment["packages"]) == sorted(environment["packages"])
    assert environment["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert "reason" not in environment


def test_without_an_installed_gpuops_every_package_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "numpy", "2", [], [])
    (tmp_path / "half_removed-1.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    environment = environment_identity()
    assert environment["packages"] == {"numpy": "2"}
    assert "not installed" in environment["reason"]


def test_the_closure_of_this_environment_is_what_packaging_says() -> None:
    requirements = pytest.importorskip("packaging.requirements")
    try:
        todo = [("gpuops", tuple(metadata.distribution("gpuops").metadata.get_all("Provides-Extra") or ()))]
    except metadata.PackageNotFoundError:
        pytest.skip("gpuops is on PYTHONPATH only")
    want, done = {}, set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in done:
            continue
        done.add((name, extras))
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        want[version._normal(name)] = found.version
        for requirement in map(requirements.Requirement, found.requires or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                todo.append((requirement.name, tuple(sorted(requirement.extras))))
    del want["gpuops"]
    packages = environment_identity()["packages"]
    assert want.items() <= packages.items()
    assert "pytest" not in packages
    assert os.sep not in json.dumps(packages)
