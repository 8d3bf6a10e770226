"""Signed bundles: one Ed25519 signature over the name and sha256 of every file, as an in-toto statement in DSSE.

    signature.dsse.json   {payloadType, payload: base64 of the statement, signatures: [{keyid, sig}]}

The signature is made over PAE(payloadType, payload) (DSSE v1, secure-systems-lab/dsse/protocol.md), the statement is
in-toto Statement v1. A key's id is the sha256 of its raw 32 bytes. Whoever can write a bundle can also remove its
signature, so a verifier that trusts any key refuses a bundle without one. A signature says who made a bundle and that
nobody changed it since; it does not say that there is no newer one.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpuops.bundle import MANIFEST, file_sha256, read_bundle
from gpuops.errors import InputError, IntegrityError, UnavailableError
from gpuops.lineage.version import canonical_json

SIGNATURE = "signature.dsse.json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:gpuops:bundle:v1"
TRUSTED = "GPUOPS_TRUSTED_KEYS"
"""Environment variable with the public keys that are trusted, paths separated by ':'."""
_ADVICE = "do not serve it; get the bundle from who signed it"


def keygen(private: str | Path, public: str | Path) -> str:
    """Make a key pair, PEM; returns its id.

    Raises:
        InputError: a file is there already, both are the same one, or a folder is missing.
        UnavailableError: `cryptography` is not installed, or a file cannot be written. After any error neither is
            there.
    """
    ed25519, serialization = _cryptography()
    private, public = Path(private), Path(public)
    if os.path.realpath(private) == os.path.realpath(public):
        raise InputError(f"{private} cannot be both keys: name a file for each")
    key = ed25519.Ed25519PrivateKey.generate()
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none)
    shown = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    begun: list[Path] = []
    try:
        for path, content, mode in ((public, shown, 0o666), (private, secret, 0o600)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            begun.append(path)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
    except OSError as error:
        for left in begun:
            left.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise InputError(f"{path} exists: a key is never overwritten; name another file") from error
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise InputError(f"{path.parent} is no folder: make it first, or name another place") from error
        raise UnavailableError(
            f"{path} could not be written ({error.strerror}): make room or get leave to write, and try again"
        ) from error
    return _key_id(key.public_key())


def sign(bundle: str | Path, private: str | Path) -> Path:
    """Sign a bundle, whose every byte is compared with its manifest first; returns the signature's file.

    Raises:
        InputError: no bundle, or no Ed25519 private key there.
        IntegrityError: the bundle differs from its manifest.
        UnavailableError: `cryptography` is not installed, or the signature cannot be written; the old one is kept.
    """
    ed25519, serialization = _cryptography()
    opened = read_bundle(bundle)
    try:
        key = serialization.load_pem_private_key(Path(private).read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{private} is not a private key ({error}): make one with `gpuops keygen`") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(f"{private} is not an Ed25519 key: make one with `gpuops keygen`")
    digests = {**opened.manifest["files"], MANIFEST: file_sha256(opened.path / MANIFEST)}
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(digests.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"version_id": opened.version_id, "run_id": opened.manifest["run_id"], "name": opened.name},
    }
    payload = canonical_json(statement)
    signature = key.sign(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": _key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    file, temporary = opened.path / SIGNATURE, opened.path / f".{SIGNATURE}.new"
    try:
        temporary.unlink(missing_ok=True)  # a killed process left it
        with temporary.open("x") as stream:
            stream.write(json.dumps(envelope, indent=1) + "\n")
        os.replace(temporary, file)  # the file may be a link to somewhere else, which is left alone
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UnavailableError(
            f"{file} could not be written ({error.strerror}): make room or get leave to write, and sign again"
        ) from error
    return file


def verify(bundle: str | Path, keys: Sequence[Path]) -> str:
    """Id of the trusted key that signed a bundle, all of whose files are as signed.

    Args:
        bundle: Bundle directory.
        keys: Public keys that are trusted.

    Raises:
        IntegrityError: not signed, not by one of them, or a file is missing, changed or added.
        InputError: a key's file holds no Ed25519 public key.
        UnavailableError: `cryptography` is not installed.
    """
    folder = Path(bundle)
    key_id, digests = signed_files(folder, keys)
    _compare(folder, digests)
    if missing := sorted(name for name in digests if not (folder / name).is_file()):
        raise IntegrityError(f"{folder / missing[0]} is signed and missing: {_ADVICE}")
    if added := sorted(p.name for p in folder.iterdir() if p.name not in (*digests, SIGNATURE)):
        raise IntegrityError(f"{folder / added[0]} is not among what was signed: {_ADVICE}")
    return key_id


def verify_deployed(folder: Path, keys: Sequence[Path]) -> str:
    """As `verify`, for a version folder of a repository, which holds some of a bundle's files and a server's own.

    The manifest must be among the signed files; what is executable beside it the repository checks itself.
    """
    key_id, digests = signed_files(folder, keys)
    if not (folder / MANIFEST).is_file() or MANIFEST not in digests:
        raise IntegrityError(f"{folder / MANIFEST} is missing or not signed: {_ADVICE}")
    _compare(folder, digests)
    return key_id


def key_id_of(signature: Path) -> str:
    """Id of the key that a signature's file says it was made with; that says nothing of whether it was.

    Raises:
        IntegrityError: it is no signature.
    """
    _, _, entries = _envelope(signature)
    return str(entries[0]["keyid"])


def trusted_keys() -> list[Path]:
    """Public keys that $GPUOPS_TRUSTED_KEYS names; none if it is not set, which accepts unsigned bundles.

    Raises:
        InputError: it is set and names none, which would silently trust everyone.
    """
    if (value := os.environ.get(TRUSTED)) is None:
        return []
    keys = [Path(part) for part in value.split(":") if part]
    if not keys:
        raise InputError(
            f"${TRUSTED} is set and names no key: name public keys, or unset it to accept unsigned bundles"
        )
    return keys


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """What DSSE signs: PAE(type, body) = "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body."""
    kind = payload_type.encode()
    return b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])


def signed_files(folder: Path, keys: Sequence[Path]) -> tuple[str, dict[str, str]]:
    """(id of the trusted key, sha256 by file name) of what the signature in a folder was made over.

    Raises:
        As `verify`; the files themselves are not looked at.
    """
    file = folder / SIGNATURE
    if not file.is_file() or file.is_symlink():
        raise IntegrityError(f"{folder} is not signed and only signed bundles are trusted here: `gpuops sign` it")
    kind, payload, entries = _envelope(file)
    if kind != PAYLOAD_TYPE:
        raise IntegrityError(f"{file} signs a {kind!r}, not {PAYLOAD_TYPE!r}: {_ADVICE}")
    message = pre_authentication_encoding(kind, payload)
    for key in [_public_key(path) for path in keys]:
        if any(_verifies(key, entry["sig"], message) for entry in entries):
            return _key_id(key), _subjects(file, payload)
    raise IntegrityError(f"{file} was made by none of the trusted keys ({', '.join(map(str, keys))}): {_ADVICE}")


def _compare(folder: Path, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        if (folder / name).is_symlink():
            raise IntegrityError(f"{folder / name} is a link, to what may be changed at any time: {_ADVICE}")
        if (folder / name).is_file() and file_sha256(folder / name) != digest:
            raise IntegrityError(f"{folder / name} differs from what was signed: {_ADVICE}")


def _envelope(file: Path) -> tuple[str, bytes, list[dict[str, Any]]]:
    """(payload type, payload, entries of keyid and decoded sig) of a DSSE envelope."""
    try:
        envelope = json.loads(file.read_text())
        entries = [{"keyid": e.get("keyid", ""), "sig": _base64(e["sig"])} for e in envelope["signatures"]]
        if not entries:
            raise ValueError("no signature in it")
        return envelope["payloadType"], _base64(envelope["payload"]), entries
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{file} is not a signature ({error}): {_ADVICE}") from error


def _base64(text: str) -> bytes:
    """Either alphabet, as DSSE demands of verifiers."""
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)


def _subjects(file: Path, payload: bytes) -> dict[str, str]:
    try:
        statement = json.loads(payload)
        kind = (statement["_type"], statement["predicateType"])
        subjects = {str(subject["name"]): str(subject["digest"]["sha256"]) for subject in statement["subject"]}
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{file} signs no statement ({error}): {_ADVICE}") from error
    if kind != (STATEMENT_TYPE, PREDICATE_TYPE) or any("/" in name for name in subjects):
        raise IntegrityError(f"{file} signs another kind of statement: {_ADVICE}")
    return subjects


def _verifies(key: Any, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _public_key(path: Path) -> Any:
    ed25519, serialization = _cryptography()
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a public key ({error}): name the one that `gpuops keygen` wrote") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise InputError(f"{path} is not an Ed25519 key: name one that `gpuops keygen` wrote")
    return key


def _key_id(key: Any) -> str:
    import hashlib

    _, serialization = _cryptography()
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()


def _cryptography() -> tuple[Any, Any]:
    """The two modules used of `cryptography`, which is the extra `sign`."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UnavailableError("cryptography is not installed: pip install 'gpuops[sign]'") from error
    return ed25519, serialization
