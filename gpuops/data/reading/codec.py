"""From an encoded chunk to its bytes: the codec chains of Zarr v2 and v3, with the decoders' contexts kept by thread.

Every chain checks that a chunk makes exactly the bytes that belong there. What is missing from a short one would be the
memory of an older batch.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import crc32c
import numcodecs
import numpy as np
import numpy.typing as npt
import zstandard

from gpuops.errors import InputError

Bytes = npt.NDArray[np.uint8]
Step = Callable[..., Any]
"""One decoding step: (encoded, out=None) to decoded bytes, in `out` where it is given."""

CHECKSUMMED = ("crc32c", "zstd+checksum", "gzip", "zlib", "bz2", "fletcher32", "adler32", "crc32")
"""Codecs that notice a flipped bit."""
RELEASED_BYTES = 128 * 2**10
"""Chunks above this are checked without the interpreter lock; for smaller ones taking it again costs more."""
TAIL_BYTES = 4
"""Size of the checksum behind a chunk of the crc32c codec."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The bytes-to-bytes codecs of an array."""

    codecs: tuple[str, ...]
    """Names in the order they were applied at writing."""
    earlier: tuple[Step, ...]
    """Decoding steps in the order they are applied, but for the last."""
    last: Step
    """The last one, which decodes into place."""
    tail_bytes: int | None
    """Bytes behind a chunk that is stored as it is, so that it can be read into place; None if it is compressed."""

    @property
    def checksummed(self) -> bool:
        """Whether a flipped bit in a chunk is noticed."""
        return any(name in CHECKSUMMED for name in self.codecs)

    def decode(self, encoded: Any, out: Bytes) -> None:
        """Decode one chunk into `out`, contiguous.

        Raises:
            ValueError: the bytes are damaged, or do not make exactly what fits `out`.
        """
        data = encoded
        try:
            for step in self.earlier:
                data = step(data)
            self.last(data, out)
        except Exception as error:  # each codec raises its library's own: zlib.error, EOFError, ZstdError, ...
            raise ValueError(str(error) or type(error).__name__) from error


def chain_v3(path: str, codecs: Sequence[dict[str, Any]]) -> Chain:
    """The chain behind the `bytes` codec of a v3 array; InputError names a codec that is not read."""
    return _chain([_codec_v3(path, codec) for codec in codecs])


def chain_v2(compressor: Any) -> Chain:
    """The chain of a v2 array's compressor, None for raw chunks."""
    return _chain([] if compressor is None else [_codec_v2(compressor)])


def check_tail(body: Any, tail: Any) -> None:
    """Compare a chunk with the little-endian crc32c behind it; ValueError if they differ."""
    if crc32c.crc32c(body, gil_release_mode=int(len(body) > RELEASED_BYTES)) != int.from_bytes(tail, "little"):
        raise ValueError("checksum differs")


def strip_crc32c(data: Any, out: Bytes | None = None) -> Bytes:
    """The bytes before a trailing crc32c, after comparing it."""
    view = np.frombuffer(data, np.uint8)
    body = view[:-TAIL_BYTES]
    check_tail(body, view[-TAIL_BYTES:].tobytes())
    return _copy(body, out)


def _chain(named: Sequence[tuple[str, Step]]) -> Chain:
    names = tuple(name for name, _ in named)
    *earlier, last = [step for _, step in reversed(named)] or [_copy]
    return Chain(names, tuple(earlier), last, {(): 0, ("crc32c",): TAIL_BYTES}.get(names))


def _codec_v3(path: str, codec: dict[str, Any]) -> tuple[str, Step]:
    name, configuration = codec["name"], codec.get("configuration") or {}
    match name:
        case "zstd":
            return "zstd+checksum" if configuration.get("checksum") else "zstd", _zstd
        case "blosc":
            return name, _blosc
        case "gzip":
            return name, _whole(numcodecs.GZip().decode)
        case "crc32c":
            return name, strip_crc32c
    raise InputError(f"{path}: codec {name!r} is not read in place: re-ingest it with `gpuops ingest`")


def _codec_v2(compressor: Any) -> tuple[str, Step]:
    match compressor.codec_id:
        case "zstd":
            return "zstd+checksum" if getattr(compressor, "checksum", False) else "zstd", _zstd
        case "blosc":
            return "blosc", _blosc
    return compressor.codec_id, _whole(compressor.decode)


def _copy(data: Any, out: Bytes | None = None) -> Bytes:
    """The bytes as they are, copied to `out`, which they must fill."""
    body = np.frombuffer(data, np.uint8)
    if out is not None:
        if body.size != out.size:  # NumPy would broadcast one byte over all of them
            raise ValueError(f"{body.size} bytes where {out.size} belong")
        out[:] = body
    return body


def _whole(decode: Callable[[Any], Any]) -> Step:
    """A codec that is not trusted with `out`: numcodecs leaves the rest of a buffer that is too large as it was."""
    return lambda data, out=None: _copy(decode(data), out)


class _Contexts(threading.local):
    """What a thread keeps from chunk to chunk."""

    def __init__(self) -> None:
        self.zstd = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def _zstd(data: Any, out: Bytes | None = None) -> Any:
    """Zstandard, by the thread's own context and straight into `out` where one frame says that it fills it.

    Libzstd then decodes in one pass and compares the checksum. Chunks of several frames, of unknown size or cut short
    go to numcodecs, which refuses what is not whole.
    """
    if out is not None and _one_frame(data if type(data) is memoryview else memoryview(data)) == out.nbytes:
        _contexts.zstd.stream_reader(data).readinto(out)
        return out
    return _copy(numcodecs.Zstd().decode(data), out)


def _one_frame(data: memoryview) -> int | None:
    """Size of the content of a buffer that holds one whole frame of known size, else None: RFC 8878, section 3.1.1."""
    try:
        content = zstandard.frame_content_size(data)
        place = zstandard.frame_header_size(data)
        last = 0
        while not last:
            header = data[place] | data[place + 1] << 8 | data[place + 2] << 16
            last, kind = header & 1, header >> 1 & 3
            place += 3 + (1 if kind == 1 else header >> 3)  # a run-length block holds its one byte
    except (zstandard.ZstdError, IndexError):
        return None
    checksum = TAIL_BYTES if data[4] & 4 else 0
    return content if place + checksum == len(data) and content >= 0 else None


def _blosc(data: Any, out: Bytes | None = None) -> Any:
    """Blosc, once its header agrees with what is there: the library reads past the end of a cut buffer."""
    view = memoryview(data)
    if len(view) < 16:
        raise ValueError(f"a blosc frame of {len(view)} bytes")
    size, _, encoded = struct.unpack_from("<iii", view, 4)
    if encoded != len(view) or (out is not None and size != out.nbytes):
        raise ValueError(f"a blosc frame of {encoded} bytes that makes {size}, in {len(view)}")
    return numcodecs.blosc.decompress(data, out)
