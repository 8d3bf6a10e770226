"""Signed bundles: what verifies, and everything that must not."""

import base64
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from gpuops.bundle import GOLDEN, MANIFEST, Golden, write_manifest
from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops.signing import (
    PAYLOAD_TYPE,
    SIGNATURE,
    TRUSTED,
    key_id_of,
    keygen,
    pre_authentication_encoding,
    sign,
    signed_files,
    trusted_keys,
    verify,
)
from gpuops.spec import Signature, TensorSpec

ROOT = Path(__file__).parents[2]


def make_bundle(directory: Path, version_id: str = "v") -> Path:
    directory.mkdir()
    x = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Golden({"x": x}, {"y": x.astype(np.float32)}).save(directory / GOLDEN)
    (directory / "model.onnx").write_bytes(b"a graph")
    signature = Signature((TensorSpec("x", "uint8", (3,)),), (TensorSpec("y", "float32", (3,)),))
    write_manifest(
        directory,
        {"name": "m", "version_id": version_id, "run_id": "r", "signature": signature.to_json(), "tolerance": 1e-5},
    )
    return directory


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """Paths of two key pairs."""
    found = {}
    for owner in ("our", "other"):
        found |= {f"{owner} private": tmp_path / f"{owner}.key", f"{owner} public": tmp_path / f"{owner}.pub"}
        keygen(found[f"{owner} private"], found[f"{owner} public"])
    return found


@pytest.fixture
def signed(tmp_path: Path, keys: dict[str, Path]) -> Path:
    bundle = make_bundle(tmp_path / "bundle")
    sign(bundle, keys["our private"])
    return bundle


def test_a_signed_bundle_verifies_under_its_key_and_no_other(signed: Path, keys: dict[str, Path]) -> None:
    key_id = verify(signed, [keys["other public"], keys["our public"]])
    assert key_id == key_id_of(signed / SIGNATURE)
    assert len(key_id) == 64
    assert signed_files(signed, [keys["our public"]])[1].keys() == {MANIFEST, GOLDEN, "model.onnx"}
    for trusted in ([keys["other public"]], []):
        with pytest.raises(IntegrityError, match="none of the trusted keys"):
            verify(signed, trusted)
    sign(signed, keys["other private"])  # who signs again is who signed
    assert verify(signed, [keys["other public"]]) != key_id


@pytest.mark.parametrize("name", [MANIFEST, GOLDEN, "model.onnx"])
def test_a_flipped_bit_in_any_file_is_found(signed: Path, keys: dict[str, Path], name: str) -> None:
    whole = (signed / name).read_bytes()
    for bit in np.linspace(0, 8 * len(whole) - 1, 40).astype(int):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        (signed / name).write_bytes(bytes(changed))
        with pytest.raises(IntegrityError, match=rf"{name} differs from what was signed"):
            verify(signed, [keys["our public"]])
    (signed / name).write_bytes(whole)
    verify(signed, [keys["our public"]])


def test_no_flipped_bit_in_the_signature_gives_another_bundle(signed: Path, keys: dict[str, Path]) -> None:
    whole = (signed / SIGNATURE).read_bytes()
    before = verify(signed, [keys["our public"]])
    survived = []
    for bit in range(0, 8 * len(whole), 37):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        (signed / SIGNATURE).write_bytes(bytes(changed))
        try:
            assert verify(signed, [keys["our public"]]) == before
        except IntegrityError:
            continue
        survived.append(bit)
    document = json.loads(whole)  # blanks and the hint of a key id are not signed
    unsigned = len(whole) - len(document["payload"]) - len(document["signatures"][0]["sig"]) - len(PAYLOAD_TYPE)
    assert len(survived) < unsigned * 8 / 37


def test_everything_that_is_not_what_was_signed_is_refused(signed: Path, keys: dict[str, Path], tmp_path: Path) -> None:
    public = [keys["our public"]]
    whole = tmp_path / "whole"
    shutil.copytree(signed, whole)

    def link(folder: Path) -> None:
        (folder / "model.onnx").rename(tmp_path / "elsewhere.onnx")
        (folder / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")

    def link_signature(folder: Path) -> None:
        (folder / SIGNATURE).rename(tmp_path / "elsewhere.json")
        (folder / SIGNATURE).symlink_to(tmp_path / "elsewhere.json")

    changes: dict[str, tuple[Callable[[Path], object], str]] = {
        "a file is added": (lambda f: (f / "model.py").write_text("evil"), "model.py is not among what was signed"),
        "a folder is added": (lambda f: (f / "__pycache__").mkdir(), "__pycache__ is not among"),
        "a file is removed": (lambda f: (f / GOLDEN).unlink(), "golden.npz is signed and missing"),
        "a file is a folder": (
            lambda f: [(f / GOLDEN).unlink(), (f / GOLDEN).mkdir()],
            "golden.npz is signed and missing",
        ),
        "the signature is removed": (lambda f: (f / SIGNATURE).unlink(), "is not signed.*gpuops sign"),
        "the signature is a folder": (
            lambda f: [(f / SIGNATURE).unlink(), (f / SIGNATURE).mkdir()],
            "is not signed",
        ),
        "a file is a link": (link, "model.onnx is a link"),
        "the signature is a link": (link_signature, "is not signed"),
    }
    for change, says in changes.values():
        shutil.rmtree(signed)
        shutil.copytree(whole, signed)
        change(signed)
        with pytest.raises(IntegrityError, match=says):
            verify(signed, public)


def envelope(private: Path, payload: bytes, kind: str = PAYLOAD_TYPE, /, **more: Any) -> str:
    """A correctly signed DSSE envelope around anything."""
    key = serialization.load_pem_private_key(private.read_bytes(), None)
    assert isinstance(key, ed25519.Ed25519PrivateKey)
    signature = base64.b64encode(key.sign(pre_authentication_encoding(kind, payload))).decode()
    return json.dumps(
        {
            "payloadType": kind,
            "payload": base64.b64encode(payload).decode(),
            "signatures": [{"keyid": "", "sig": signature}],
            **more,
        }
    )


def statement(signed: Path, **changes: Any) -> bytes:
    document = json.loads(base64.b64decode(json.loads((signed / SIGNATURE).read_text())["payload"]))
    return json.dumps({**document, **changes}).encode()


def test_what_a_trusted_key_signed_for_another_purpose_is_refused(signed: Path, keys: dict[str, Path]) -> None:
    private, public = keys["our private"], [keys["our public"]]
    subjects = json.loads(statement(signed))["subject"]
    traversal = [{"name": "../bundle/model.onnx", "digest": {"sha256": "0"}}]
    for text, says in (
        (envelope(private, statement(signed), "application/json"), "signs a 'application/json', not"),
        (envelope(private, statement(signed, _type="https://in-toto.io/Statement/v0.1")), "another kind of statement"),
        (envelope(private, statement(signed, predicateType="urn:gpuops:checkpoint:v1")), "another kind of statement"),
        (envelope(private, statement(signed, subject=subjects + traversal)), "another kind of statement"),
        (envelope(private, statement(signed, subject=[])), "is not among what was signed"),
        (envelope(private, statement(signed, subject="all of it")), "signs no statement"),
        (envelope(private, b"[]"), "signs no statement"),
        (envelope(private, b"\xff"), "signs no statement"),
        (envelope(private, statement(signed), signatures=[]), "is not a signature"),
        (envelope(private, statement(signed), signatures=[{"keyid": "", "sig": "AAAA"}]), "none of the trusted keys"),
        (envelope(private, statement(signed), payload="%%%"), "is not a signature"),
        ("[]", "is not a signature"),
        ("null", "is not a signature"),
    ):
        (signed / SIGNATURE).write_text(text)
        with pytest.raises(IntegrityError, match=says):
            verify(signed, public)
    (signed / SIGNATURE).write_text(envelope(private, statement(signed_again(signed, private))))
    verify(signed, public)


def signed_again(bundle: Path, private: Path) -> Path:
    sign(bundle, private)
    return bundle


def test_a_cut_signature_is_refused_wherever_it_is_cut(signed: Path, keys: dict[str, Path]) -> None:
    whole = (signed / SIGNATURE).read_text()
    for end in range(0, len(whole.rstrip()) - 1, 7):
        (signed / SIGNATURE).write_text(whole[:end])
        with pytest.raises(IntegrityError, match="is not a signature"):
            verify(signed, [keys["our public"]])


def test_a_signature_of_another_bundle_is_refused(signed: Path, keys: dict[str, Path], tmp_path: Path) -> None:
    another = make_bundle(tmp_path / "another", version_id="w")
    sign(another, keys["our private"])
    shutil.copy(another / SIGNATURE, signed / SIGNATURE)
    with pytest.raises(IntegrityError, match=r"manifest\.json differs from what was signed"):
        verify(signed, [keys["our public"]])


def test_a_second_signature_does_not_take_the_first_ones_place(signed: Path, keys: dict[str, Path]) -> None:
    both = json.loads((signed / SIGNATURE).read_text())
    sign(signed, keys["other private"])
    both["signatures"].insert(0, json.loads((signed / SIGNATURE).read_text())["signatures"][0])
    (signed / SIGNATURE).write_text(json.dumps(both))
    for owner in ("our", "other"):
        verify(signed, [keys[f"{owner} public"]])


def test_either_base64_alphabet_is_read_as_dsse_demands(signed: Path, keys: dict[str, Path]) -> None:
    def other(text: str) -> str:
        return text.replace("+", "-").replace("/", "_")

    document = json.loads((signed / SIGNATURE).read_text())
    for number in range(100):  # until the two alphabets differ
        if other(document["signatures"][0]["sig"]) != document["signatures"][0]["sig"]:
            break
        document = json.loads(envelope(keys["our private"], statement(signed, number=number)))
    document["payload"] = other(document["payload"])
    document["signatures"][0]["sig"] = other(document["signatures"][0]["sig"])
    (signed / SIGNATURE).write_text(json.dumps(document))
    verify(signed, [keys["our public"]])


@given(st.text(min_size=1), st.binary(), st.text(min_size=1), st.binary())
def test_no_two_contents_are_signed_as_the_same_bytes(kind: str, payload: bytes, kind2: str, payload2: bytes) -> None:
    if (kind, payload) != (kind2, payload2):
        assert pre_authentication_encoding(kind, payload) != pre_authentication_encoding(kind2, payload2)


def test_the_bytes_that_are_signed_are_those_of_the_protocol() -> None:
    # The example of secure-systems-lab/dsse, protocol.md.
    assert (
        pre_authentication_encoding("http://example.com/HelloWorld", b"hello world")
        == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_a_changed_bundle_is_not_signed(tmp_path: Path, keys: dict[str, Path]) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "model.onnx").write_bytes(b"another graph")
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        sign(bundle, keys["our private"])
    assert not (bundle / SIGNATURE).exists()


def test_signing_does_not_follow_a_link(signed: Path, keys: dict[str, Path], tmp_path: Path) -> None:
    (signed / SIGNATURE).unlink()
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (signed / SIGNATURE).symlink_to(victim)
    sign(signed, keys["our private"])
    assert victim.read_text() == "kept"
    verify(signed, [keys["our public"]])


def test_keys_are_made_once_and_the_private_one_is_its_owners(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        keygen(tmp_path / "a.key", tmp_path / "a.pub")
    finally:
        os.umask(previous)
    assert (tmp_path / "a.key").stat().st_mode & 0o777 == 0o600
    for pair in (("a.key", "b.pub"), ("b.key", "a.pub")):
        with pytest.raises(InputError, match="never overwritten"):
            keygen(tmp_path / pair[0], tmp_path / pair[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.key", "a.pub"]


@contextmanager
def no_room() -> Iterator[None]:
    """No file of this process can hold a byte, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("private", "public", "kind", "says"),
    [
        ("k", "k", InputError, "cannot be both keys"),
        ("k", "missing/k.pub", InputError, "missing is no folder"),
        ("missing/k", "k.pub", InputError, "missing is no folder"),
        ("k", "x" * 300, UnavailableError, "could not be written"),
    ],
)
def test_a_pair_of_keys_is_whole_or_not_there(
    tmp_path: Path, private: str, public: str, kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        keygen(tmp_path / private, tmp_path / public)
    with no_room(), pytest.raises(UnavailableError, match="could not be written"):
        keygen(tmp_path / "full", tmp_path / "full.pub")
    assert list(tmp_path.iterdir()) == []


def test_on_a_full_disk_the_signature_stays_the_old_one(signed: Path, keys: dict[str, Path]) -> None:
    before = (signed / SIGNATURE).read_bytes()
    with no_room(), pytest.raises(UnavailableError, match="could not be written"):
        sign(signed, keys["other private"])
    assert (signed / SIGNATURE).read_bytes() == before
    verify(signed, [keys["our public"]])  # and nothing lies beside it
    (signed / f".{SIGNATURE}.new").write_text("of a killed one")
    sign(signed, keys["other private"])
    verify(signed, [keys["other public"]])


def test_what_is_no_key_is_named(signed: Path, keys: dict[str, Path], tmp_path: Path) -> None:
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    ecdsa = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "ec.key").write_bytes(ecdsa.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    (tmp_path / "ec.pub").write_bytes(
        ecdsa.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    for path in (tmp_path / "gone", signed / MANIFEST, keys["our public"], tmp_path / "ec.key"):
        with pytest.raises(InputError, match="gpuops keygen"):
            sign(signed, path)
    for path in (tmp_path / "gone", signed / MANIFEST, keys["our private"], tmp_path / "ec.pub"):
        with pytest.raises(InputError, match="gpuops keygen"):
            verify(signed, [path, keys["our public"]])


def test_trusted_keys_come_from_the_environment_and_naming_none_is_no_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUSTED, raising=False)
    assert trusted_keys() == []
    monkeypatch.setenv(TRUSTED, "/a.pub:/b.pub")
    assert trusted_keys() == [Path("/a.pub"), Path("/b.pub")]
    for nothing in ("", ":"):
        monkeypatch.setenv(TRUSTED, nothing)
        with pytest.raises(InputError, match="names no key"):
            trusted_keys()


def test_without_cryptography_the_message_names_the_extra(signed: Path, keys: dict[str, Path]) -> None:
    code = f"""
import sys
sys.modules["cryptography"] = None
from pathlib import Path
from gpuops.errors import UnavailableError
from gpuops.signing import verify
try:
    verify({str(signed)!r}, [Path({str(keys["our public"])!r})])
except UnavailableError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "pip install 'gpuops[sign]'" in done.stdout
