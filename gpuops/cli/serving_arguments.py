"""The arguments of the commands from a run to a served request."""

from __future__ import annotations

from typing import Any

from gpuops.cli.arguments import Commands, flag, ledger
from gpuops.cli.connection import add_connection

_GRPC = "grpc://127.0.0.1:8001"  # while a model is loaded over HTTP, Triton lets most other HTTP clients wait


def add(commands: Commands) -> None:
    """Add the commands in the order in which they are used."""
    _bundles(commands)
    _deploying(commands)
    _asking(commands)
    _watching(commands)


def _bundles(commands: Commands) -> None:
    sub = commands.add("export", "A run's best weights as a proved bundle.", "gpuops export out/run out/bundle")
    sub.add_argument("run", help="run directory (trainer.default_root_dir)")
    sub.add_argument("bundle", help="directory to write")
    sub.add_argument("--formats", default="pt2,onnx", help="of pt2, onnx, int8, aoti, separated by commas")
    sub.add_argument("--name", help="name to serve it under; the model class's if left out")
    sub.add_argument("--max-batch", type=int, default=32, help="largest batch served")
    sub.add_argument("--tolerance", type=float, help="largest difference allowed, physical units; rounding if left out")
    sub.add_argument("--device", default="cpu", help="cpu or cuda: what aoti is compiled for")
    sub.add_argument(
        "--int8-bound", type=float, default=0.02, help="share of its error by which int8 may be worse than float32"
    )
    flag(sub, "--overwrite", "replace the bundle that is there, once the new one is proved")
    flag(sub, "--json", "print JSON")
    ledger(sub)

    sub = commands.add(
        "verify",
        "Prove a bundle again: bytes, identity, answers at every batch size; in process, or through a live server.",
        "gpuops verify out/bundle [--server grpc://127.0.0.1:8001]",
    )
    sub.add_argument("bundle", help="bundle directory")
    sub.add_argument(
        "--server",
        action="append",
        default=[],
        help="URL of a server that serves it; may be given twice",
    )
    sub.add_argument("--model", help="its name there; the bundle's if left out")
    flag(sub, "--json", "print JSON")

    sub = commands.add("keygen", "A key pair to sign bundles with (Ed25519).", "gpuops keygen release.key release.pub")
    sub.add_argument("private", help="file for the private key; keep it off the servers")
    sub.add_argument("public", help="file for the public key, which servers trust")

    sub = commands.add("sign", "Sign a bundle: deploy and serve can then refuse any other.", "gpuops sign out/bundle k")
    sub.add_argument("bundle", help="bundle directory")
    sub.add_argument("key", help="private key")
    ledger(sub)


def _how_served(sub: Any) -> None:
    sub.add_argument("--name", help="model name; the bundle's if left out")
    sub.add_argument(
        "--backend",
        default="python",
        help="python (ONNX in our shim), python-int8, python-pt2, python-aoti, onnxruntime, torch_aoti or tensorrt",
    )
    flag(sub, "--gpu", "instances on GPUs rather than on the CPU")
    sub.add_argument("--instances", type=int, help="copies that run at the same time (on each GPU)")
    sub.add_argument("--threads", type=int, help="runtime threads of an instance; 0 is one a core")
    sub.add_argument("--micro-batch", type=int, help="most samples given to the graph at once; 0 is the whole batch")
    sub.add_argument("--delay-us", type=int, default=0, help="longest wait for more requests to join a batch")
    sub.add_argument("--queue-size", type=int, default=0, help="requests that may wait; more are rejected; 0: no limit")
    sub.add_argument("--tag", action="append", default=[], metavar="KEY=VALUE", help="label on the server's metrics")
    sub.add_argument("--server-version", default="2.51.0", help="version of the server that will read it")
    sub.add_argument("--trusted", action="append", default=[], metavar="KEY", help="public key of who signed it")


def _limits(sub: Any) -> None:
    sub.add_argument("--requests", metavar="NPZ", help="inputs by name to compare on, one sample a row")
    sub.add_argument("--count", type=int, default=400, help="requests to each version")
    sub.add_argument("--max-errors", type=float, default=0.0, help="share of requests that only the new one may fail")
    sub.add_argument("--max-p50", type=float, default=1.25, help="largest ratio of median latencies, new to old")
    sub.add_argument("--max-p99", type=float, default=1.5, help="largest ratio of 99th percentiles")
    sub.add_argument("--max-distance", type=float, help="largest difference of answers, physical units")
    sub.add_argument("--max-joules", type=float, help="largest ratio of joules a request")


def _deploying(commands: Commands) -> None:
    sub = commands.add(
        "deploy", "Publish a bundle in a Triton model repository.", "gpuops deploy out/bundle out/repository --tune"
    )
    sub.add_argument("bundle", help="bundle directory")
    sub.add_argument("repository", help="model repository; made if it is not there")
    _how_served(sub)
    flag(sub, "--tune", "measure instances, threads and batching here, with the bundle's own samples (half a minute)")
    sub.add_argument("--plan", metavar="FILE", help="TensorRT engine, for that backend")
    flag(sub, "--json", "print JSON")
    ledger(sub)

    sub = commands.add(
        "publish",
        "Put what a repository serves under an object store: an immutable prefix, then the pointer.",
        "gpuops publish out/repository s3://bucket/models",
    )
    sub.add_argument("repository", help="model repository")
    sub.add_argument("store", help="s3://BUCKET/PREFIX, gs://, az:// or file:///PATH")
    sub.add_argument("--trusted", action="append", default=[], metavar="KEY", help="public key of who signed it")
    ledger(sub)

    sub = commands.add(
        "fetch", "Get a published repository, every byte checked.", "gpuops fetch s3://bucket/models out/repository"
    )
    sub.add_argument("store", help="as it was published")
    sub.add_argument("repository", help="folder for it; appears whole or not at all")
    sub.add_argument("--number", type=int, help="an earlier publication; the current one if left out")
    sub.add_argument("--trusted", action="append", default=[], metavar="KEY", help="public key of who signed it")
    flag(sub, "--overwrite", "replace the folder that is there")
    ledger(sub)

    sub = commands.add("serve", "Serve a repository on loopback until interrupted.", "gpuops serve out/repository")
    sub.add_argument("repository", help="model repository")
    for protocol, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        sub.add_argument(f"--{protocol}-port", type=int, default=port, help=f"{protocol} port; 0 takes a free one")
    sub.add_argument("--control", metavar="FILE", help="let who holds the key written there load models, for rollout")
    flag(sub, "--shared-memory", "let clients of this host attach shared memory")
    sub.add_argument("--tls-certificate", metavar="PEM", help="the server's certificate for 127.0.0.1: TLS on gRPC")
    sub.add_argument("--tls-key", metavar="PEM", help="its key")
    sub.add_argument("--tls-ca", metavar="PEM", help="who signed it; the certificate itself if left out")
    flag(sub, "--tls-mutual", "clients need a certificate of that authority too; the proof at start uses the server's")
    sub.add_argument("--trusted", action="append", default=[], metavar="KEY", help="public key of who signed it")
    sub.add_argument("--trace", metavar="FILE", help="write traces there, best in /dev/shm, for `gpuops meter --trace`")
    sub.add_argument("--tritonserver", help="path of the server's binary, if it is not found by itself")
    sub.add_argument("--log", help="file for the server's log")
    flag(sub, "--container", "print the command that serves it in production, and end")
    ledger(sub)

    sub = commands.add(
        "rollout",
        "Try a bundle beside the version that serves, compare them, promote it or leave all as it was; 1 if rejected.",
        "gpuops rollout out/bundle2 out/repository --access control.key",
    )
    sub.add_argument("bundle", help="bundle directory")
    sub.add_argument("repository", help="model repository of the server, as this host sees it")
    _how_served(sub)
    _limits(sub)
    add_connection(sub, _GRPC)
    flag(sub, "--json", "print JSON")
    ledger(sub)

    sub = commands.add(
        "rollback", "Serve a model without its newest version, at once.", "gpuops rollback m out/r --access control.key"
    )
    sub.add_argument("model", help="model name")
    sub.add_argument("repository", help="model repository of the server, as this host sees it")
    add_connection(sub, _GRPC)
    flag(sub, "--json", "print JSON")
    ledger(sub)

    sub = commands.add(
        "route",
        "A small router before one server: a share of the requests to another version, sticky, or mirrored to it.",
        "gpuops route forecast:1 forecast:2 --share 0.1",
    )
    sub.add_argument("stable", metavar="MODEL:VERSION", help="the version that answers")
    sub.add_argument("candidate", metavar="MODEL:VERSION", help="the version that gets a share")
    sub.add_argument("--share", type=float, default=0.1, help="share of the requests, 0 to 1")
    flag(sub, "--shadow", "send the share to both, answer from the stable one")
    flag(sub, "--fallback", "answer from the stable one what the candidate does not answer")
    sub.add_argument("--port", type=int, default=8080, help="port on loopback; 0 takes a free one")
    sub.add_argument("--server", default="http://127.0.0.1:8000", help="http://HOST:PORT")


def _asking(commands: Commands) -> None:
    sub = commands.add(
        "infer",
        "Send raw samples from a store to a served model.",
        "gpuops infer forecast --from out/linke --server grpc://127.0.0.1:8001",
    )
    sub.add_argument("model", help="model name")
    sub.add_argument(
        "--from",
        dest="source",
        metavar="[NAME=]URL",
        action="append",
        required=True,
        help="store that the samples are cut from; NAME=URL for each of several that the model was trained on",
    )
    sub.add_argument("--align", metavar="DIM", help="dimension that several stores are aligned on")
    sub.add_argument(
        "--samples", type=int, help="send this many, evenly spaced; the bundle's golden samples if left out"
    )
    sub.add_argument("--requests", type=int, default=100, help="timed requests of one sample each")
    sub.add_argument("--check", metavar="BUNDLE", help="compare the golden samples' answers with the bundle's")
    sub.add_argument("--out", metavar="FILE", help="write the answers as .npz")
    add_connection(sub)
    flag(sub, "--json", "print JSON")

    sub = commands.add(
        "compare",
        "Two versions on the same requests: errors, latency, answers, joules; exit code 1 if the new one is worse.",
        "gpuops compare forecast:3 forecast:4",
    )
    sub.add_argument("old", metavar="MODEL:VERSION", help="the version that serves")
    sub.add_argument("new", metavar="MODEL:VERSION", help="the version on trial")
    _limits(sub)
    add_connection(sub)
    flag(sub, "--json", "print JSON")

    sub = commands.add(
        "bench",
        "Load on a served model: latency at a rate (open loop), requests a second at a concurrency (closed loop).",
        "gpuops bench serve forecast --rate 100 200 --concurrency 1 8 64",
    )
    sub.add_argument("what", choices=["serve"], help="serve: a served model")
    sub.add_argument("model", help="model name")
    sub.add_argument("--version", default="", help="version number; the server's choice if left out")
    sub.add_argument("--rate", type=float, nargs="*", default=[], help="requests a second, one run each")
    sub.add_argument("--concurrency", type=int, nargs="*", default=[], help="requests under way, one run each")
    sub.add_argument("--seconds", type=float, default=10.0, help="length of a run")
    sub.add_argument("--size", type=int, default=1, help="samples a request")
    sub.add_argument("--arrivals", default="poisson", help="poisson or constant")
    sub.add_argument("--bundle", help="bundle whose golden samples are sent and whose answers are checked")
    sub.add_argument("--requests", metavar="NPZ", help="inputs by name to send; the first answers are what is right")
    sub.add_argument("--out", metavar="FILE", help="write JSON")
    add_connection(sub)
    flag(sub, "--json", "print JSON")


def _watching(commands: Commands) -> None:
    sub = commands.add(
        "probe",
        "Golden requests to a live server, also to one that others built: finds dead models behind HTTP 200; exit code "
        "1 if one is.",
        "gpuops probe goldens --record; gpuops probe goldens",
    )
    sub.add_argument("folder", nargs="?", help="folder of recorded golden requests")
    flag(sub, "--record", "record them from the live models, whose answers are trusted now")
    sub.add_argument("--repository", help="instead: every version that this gpuops repository names")
    sub.add_argument("--only", action="append", default=[], metavar="MODEL", help="this model only")
    sub.add_argument(
        "--inputs", action="append", default=[], metavar="MODEL=NPZ", help="inputs to record a model with, by name"
    )
    flag(sub, "--overwrite", "replace what was recorded there")
    add_connection(sub)
    flag(sub, "--json", "print JSON")

    sub = commands.add(
        "lint",
        "Errors and traps in any model repository, before a server reads it; exit code 1 if there are errors.",
        "gpuops lint /models --server-version 2.71.0",
    )
    sub.add_argument("repository", help="model repository")
    sub.add_argument("--server-version", default="2.51.0", help="version of the server that will read it")
    sub.add_argument("--gpus", type=int, default=0, help="how many GPUs that server has")
    sub.add_argument("--server-flag", action="append", default=[], metavar="FLAG", help="a flag it is started with")
    flag(sub, "--json", "print JSON")

    sub = commands.add(
        "meter",
        "Joules per request and per model version of a server on this host: a report, or metrics for Prometheus.",
        "gpuops meter --port 9464 --repository /models",
    )
    sub.add_argument("--port", type=int, help="serve Prometheus metrics on this port until interrupted; 0: a free one")
    sub.add_argument("--address", default="127.0.0.1", help="address that the metrics are served on")
    sub.add_argument("--seconds", type=float, default=10.0, help="without --port: meter this long, then report")
    sub.add_argument("--every", type=float, default=1.0, metavar="S", help="time between two looks, seconds")
    sub.add_argument("--trace", metavar="FILE", help="trace file that the server writes, for exact begin and end")
    sub.add_argument("--repository", help="gpuops repository, for golden probes and version ids")
    sub.add_argument("--namespace", default="", help="label that tells servers apart")
    add_connection(sub)
    flag(sub, "--json", "print JSON")
