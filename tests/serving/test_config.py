"""config.pbtxt from typed values: golden files for each server and backend, and back to the values again."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bundle import SAMPLE, SIGNATURE, answers, golden, make_bundle

from gpuops.bundle import Golden, read_bundle, write_manifest
from gpuops.errors import InputError
from gpuops.spec import Signature, TensorSpec
from gpuops_serving.client import Client
from gpuops_serving.config import (
    BACKENDS,
    ENSEMBLE,
    Options,
    config_text,
    model_config,
    options_of,
    own_config,
    read_config,
)
from gpuops_serving.ensemble import ensemble_bundle
from gpuops_serving.gates import GATES
from gpuops_serving.repository import deploy
from gpuops_serving.scheduling import Batching, Queue, RateLimit, Resource, Sequences, Step
from gpuops_serving.server import TritonServer

GOLDEN = Path(__file__).parent / "configs"
QUEUES = Batching(
    (2, 4),
    500,
    64,
    2_000_000,
    client_timeout=True,
    priorities=2,
    default_priority=2,
    queues={1: Queue(8, 50_000, late=True)},
)
CASES: dict[str, dict[str, Options]] = {
    "2.51.0": {
        "python": Options(threads=2, tags={"team": "weather"}),
        "python-int8": Options("python-int8", threads=2, micro_batch=4),
        "python-pt2": Options("python-pt2"),
        "python-aoti": Options("python-aoti", instances=2, threads=1),
        "onnxruntime": Options("onnxruntime", threads=4),
        "tensorrt": Options("tensorrt", gpu=True),
        "queues": Options(batching=QUEUES),
        "cache": Options(cache=True),
        "limit": Options(limit=RateLimit((Resource("decoder", 2), Resource("disk", everywhere=True)), 3)),
        "ensemble": Options(ENSEMBLE),
    },
    "2.71.0": {
        "onnxruntime": Options("onnxruntime", gpu=True),
        "torch_aoti": Options("torch_aoti", threads=2, server_version="2.71.0"),
        "ensemble": Options(ENSEMBLE, max_inflight=4, server_version="2.71.0"),
    },
    "2.75.0": {
        "python": Options(gpu=True),
        "torch_aoti": Options("torch_aoti", gpu=True, instances=2, server_version="2.75.0"),
        "tensorrt": Options("tensorrt", gpu=True, server_version="2.75.0"),
    },
}
"""How the tiny bundle is deployed for each golden file, by server version and model name."""
LOADED = ("python", "python-int8", "python-pt2", "python-aoti", "queues", "cache", "limit", "ensemble")
"""Those for 2.51 that the slow tests load into the real server; it has no backends for the others."""


def header(version: str, name: str) -> str:
    """First line of a golden file: what it is known to be good for."""
    if version == "2.51.0" and name in LOADED:
        return "# Loaded by tritonserver 2.51.0, and answered: tests/serving/test_config.py.\n"
    return f"# For tritonserver {version}: checked as protobuf only, not loaded.\n"


def bundle_for(folder: Path, options: Options, repository: Path) -> Path:
    """The tiny bundle with a file of the format that these options run; what is in it does not matter here."""
    if options.backend == ENSEMBLE:
        deploy(make_bundle(folder / "step"), repository, name="step")
        step = Step("step", {"a": "a", "m": "m"}, {"y": "z"})
        asked = Golden(golden().inputs, {"z": golden().outputs["y"]})
        return ensemble_bundle(folder / "chain", repository, "chain", [step], asked)
    bundle = make_bundle(folder / "bundle")
    how = BACKENDS[options.backend]
    if how.format not in (None, "onnx"):
        from gpuops.bundle import FORMAT_FILES

        (bundle / FORMAT_FILES[how.format]).write_bytes(how.format.encode())
        manifest = {**read_bundle(bundle).manifest, "int8": {"tolerance": 0.5}}
        write_manifest(bundle, {key: value for key, value in manifest.items() if key != "sha256"})
    return bundle


def deployed_config(folder: Path, name: str, options: Options) -> str:
    """What `deploy` writes, with the golden files' first line left out."""
    repository = folder / "repository"
    bundle = bundle_for(folder, options, repository)
    plan = folder / "engine.plan"
    plan.write_bytes(b"plan")
    deploy(bundle, repository, name=name, options=options, plan=plan)
    return (repository / name / "config.pbtxt").read_text()


CASE_LIST = [(version, name) for version, cases in CASES.items() for name in cases]


@pytest.mark.parametrize(("version", "name"), CASE_LIST)
def test_what_deploy_writes_is_the_golden_file(tmp_path: Path, version: str, name: str) -> None:
    found = deployed_config(tmp_path, name, CASES[version][name])
    assert header(version, name) + found == (GOLDEN / version / f"{name}.pbtxt").read_text()


def test_every_golden_file_has_a_case_and_is_read_back_to_its_options() -> None:
    files = {(path.parent.name, path.stem) for path in GOLDEN.rglob("*.pbtxt")}
    assert files == {*CASE_LIST, ("2.51.0", "own-sequences")}
    for version, name in CASE_LIST:
        config = read_config(GOLDEN / version / f"{name}.pbtxt")
        assert options_of(config, CASES[version][name].server_version) == CASES[version][name]


def test_every_backend_has_a_golden_file() -> None:
    assert {options.backend for cases in CASES.values() for options in cases.values()} == set(BACKENDS)


OWN = Options(batching=Sequences(5_000_000, 4, (2,), 100, end="END", ready="READY"))


def own_text() -> str:
    """The golden file of a model that is no bundle."""
    signature = Signature((TensorSpec("v", "float32", (1,)),), (TensorSpec("total", "float32", (1,)),), 4)
    told = "# For tritonserver 2.51.0: checked as protobuf; a smaller one is loaded in test_scheduling.py.\n"
    return told + config_text(own_config("own-sequences", signature, OWN))


def test_a_model_of_ones_own_gets_sequences_and_no_word_of_a_bundle() -> None:
    assert own_text() == (GOLDEN / "2.51.0" / "own-sequences.pbtxt").read_text()
    assert options_of(read_config(GOLDEN / "2.51.0" / "own-sequences.pbtxt")) == OWN
    assert "gpuops.version_id" not in own_text()


SIZES = st.integers(1, SIGNATURE.max_batch)
QUEUE = st.builds(Queue, st.integers(0, 9), st.integers(0, 9), st.booleans(), st.booleans())


@st.composite
def batchings(draw: st.DrawFn) -> Batching:
    levels = draw(st.integers(0, 3))
    queue = draw(QUEUE)
    made = Batching(
        tuple(draw(st.lists(SIZES, max_size=3))),
        draw(st.integers(0, 10**6)),
        queue.size,
        queue.timeout_us,
        queue.late,
        queue.client_timeout,
        priorities=levels,
        default_priority=draw(st.integers(1, levels)) if levels else 0,
        queues=draw(st.dictionaries(st.integers(1, levels), QUEUE)) if levels else {},
    )
    return made


@st.composite
def all_options(draw: st.DrawFn, *, own: bool = False) -> Options:
    backend = draw(st.sampled_from([n for n in BACKENDS if n != ENSEMBLE and not (own and n.startswith("python-"))]))
    gates = [GATES[gate].since for gate in BACKENDS[backend].gates]
    version = ".".join(map(str, max(gates, default=(2, 51, 0))))
    candidates = draw(st.integers(0, 3))
    sequences = st.builds(
        Sequences,
        st.integers(1, 10**7),
        st.just(candidates),
        st.lists(SIZES, max_size=2).map(tuple) if candidates else st.just(()),
        st.integers(0, 99),
        st.sampled_from(["", "S"]),
        st.sampled_from(["", "E"]),
        st.sampled_from(["", "R"]),
        st.sampled_from(["", "C"]),
    )
    batching = draw(sequences) if own and draw(st.booleans()) else draw(batchings())
    resources = st.lists(st.builds(Resource, st.sampled_from("abc"), SIZES, st.booleans()), max_size=3)
    unique = resources.map(lambda found: tuple({resource.name: resource for resource in found}.values()))
    return Options(
        backend,
        draw(st.booleans()),
        draw(st.integers(1, 9)),
        draw(st.integers(0, 9)) if BACKENDS[backend].threads else 0,
        draw(st.integers(0, 9)) if BACKENDS[backend].backend == "python" else 0,
        batching,
        draw(st.dictionaries(st.sampled_from(["team", "site"]), st.text(max_size=5))),
        version,
        draw(st.booleans()) and isinstance(batching, Batching),
        draw(st.none() | st.builds(RateLimit, unique, SIZES)),
    )


@settings(max_examples=60, deadline=None)
@given(all_options())
def test_options_come_back_from_the_text_that_they_make(options: Options) -> None:
    config = model_config("tiny", {3: "abc", 2: "abb"}, SIGNATURE, sample=SAMPLE, options=options)
    again = type(config)()
    from google.protobuf import text_format

    text_format.Parse(config_text(config), again)
    assert again == config
    assert options_of(again, options.server_version) == options


@settings(max_examples=60, deadline=None)
@given(all_options(own=True))
def test_so_do_those_of_a_model_of_ones_own(options: Options) -> None:
    assert options_of(own_config("own", SIGNATURE, options), options.server_version) == options


def test_every_dtype_that_may_cross_the_wire_has_a_triton_type() -> None:
    dtypes = ("uint8", "int8", "int16", "uint16", "int32", "float32")
    signature = Signature(tuple(TensorSpec(d, d, (1,)) for d in dtypes), (TensorSpec("y", "float32", (1,)),))

    def types(options: Options) -> list[str]:
        config = model_config("all", {1: ""}, signature, sample=None, options=options)
        enum = type(config).DESCRIPTOR.fields_by_name["input"].message_type.fields_by_name["data_type"].enum_type
        return [enum.values_by_number[tensor.data_type].name for tensor in config.input]

    assert types(Options()) == ["TYPE_UINT8", "TYPE_INT8", "TYPE_INT16", "TYPE_UINT16", "TYPE_INT32", "TYPE_FP32"]
    wide = types(Options("tensorrt"))  # it has no 16-bit integers
    assert wide == ["TYPE_UINT8", "TYPE_INT8", "TYPE_INT32", "TYPE_INT32", "TYPE_INT32", "TYPE_FP32"]


def test_warm_up_data_are_in_the_dtype_that_the_backend_takes(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    manifest = read_bundle(bundle).manifest
    narrow = Golden({"a": golden().inputs["a"], "m": golden().inputs["m"].astype(np.int16)}, golden().outputs)
    narrow.save(bundle / "golden.npz")
    signature = Signature((SIGNATURE.inputs[0], TensorSpec("m", "int16", (1,))), SIGNATURE.outputs, 5)
    document = {**manifest, "signature": signature.to_json()}
    write_manifest(bundle, {key: value for key, value in document.items() if key != "sha256"})
    plan = tmp_path / "engine"
    plan.write_bytes(b"")
    for backend, size in (("tensorrt", 4), ("onnxruntime", 2)):
        deploy(bundle, tmp_path / backend, options=Options(backend), plan=plan)
        config = read_config(tmp_path / backend / "tiny" / "config.pbtxt")
        for entry in config.model_warmup:
            file = tmp_path / backend / "tiny" / "warmup" / entry.inputs["m"].input_data_file
            assert len(file.read_bytes()) == size
            assert int.from_bytes(file.read_bytes(), "little") == narrow.inputs["m"][0, 0]


def test_the_backends_own_tensor_names_stand_beside_the_signatures() -> None:
    options = Options("torch_aoti", server_version="2.71.0")
    config = model_config("tiny", {1: "abc"}, SIGNATURE, sample=None, options=options)
    names = json.loads(config.parameters["gpuops.tensors"].string_value)
    assert [names["inputs"][spec.name] for spec in SIGNATURE.inputs] == [tensor.name for tensor in config.input]
    assert [names["outputs"][spec.name] for spec in SIGNATURE.outputs] == [tensor.name for tensor in config.output]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Options("pytorch"), "'pytorch' is unknown; there are python"),
        (lambda: Options(instances=0), "instances is 0: give at least 1, at most 1024"),
        (lambda: Options(threads=-1), "threads is -1: give at least 0, at most 4096"),
        (lambda: Options("onnxruntime", micro_batch=2), "runs batches as they are: leave micro_batch"),
        (lambda: Options("torch_aoti"), r"2\.51\.0 has no .*torch_aoti.*26\.03 \(2\.67\.0\)"),
        (lambda: Options("torch_aoti", server_version="2.70.0"), r"no batches in torch_aoti.*26\.07"),
        (lambda: Options(max_inflight=1), r"no `max_inflight_requests`.*25\.11"),
        (lambda: Options(cache=True, batching=Sequences()), "cannot be cached"),
        (lambda: Batching(priorities=2), "name one of 1"),
        (lambda: Batching(priorities=2, default_priority=3), "name one of 1"),
        (lambda: Batching(default_priority=1), "or 0 with no priorities"),
        (lambda: Batching(queues={1: Queue()}), "a queue for priority 1: there are 0"),
        (lambda: Batching(queue_size=-1), "a queue of -1 requests"),
        (lambda: Batching((0,)), "sizes from 1"),
        (lambda: Batching(preserve_order=True, priorities=2, default_priority=1), "preserve_order excludes"),
        (lambda: Batching(preserve_order=True, late=True, timeout_us=5), "preserve_order excludes"),
        (lambda: Sequences(start="X", id="X"), "name each one differently"),
        (lambda: Sequences(preferred=(2,)), "need `candidates`"),
        (lambda: Sequences(idle_us=0), "idle_us and preferred sizes from 1"),
        (lambda: RateLimit(priority=0), "1 or more"),
        (lambda: RateLimit((Resource("a"), Resource("a"))), "each resource once"),
    ],
)
def test_a_choice_that_triton_would_refuse_is_refused_when_it_is_made(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


SCALAR = Signature((TensorSpec("x", "uint8", ()),), SIGNATURE.outputs)


@pytest.mark.parametrize(
    ("signature", "versions", "options", "says"),
    [
        (Signature(SIGNATURE.inputs, SIGNATURE.outputs, 0), {1: ""}, Options(), "max_batch 0"),
        (SIGNATURE, {}, Options(), "no version to serve"),
        (SCALAR, {1: ""}, Options(), r"'x' has no axis but the batch.*shape \[1\]"),
        (SIGNATURE, {1: ""}, Options(batching=Batching((6,))), "preferred batch 6 is larger than the largest batch, 5"),
        (SIGNATURE, {1: ""}, Options(batching=Sequences()), "keeps nothing between requests"),
        (SIGNATURE, {1: ""}, Options(ENSEMBLE), "are for each other only"),
        (SIGNATURE, {1: ""}, Options(max_inflight=1, server_version="2.63.0"), "are for each other only"),
    ],
)
def test_a_model_that_triton_would_refuse_is_refused(
    signature: Signature, versions: dict[int, str], options: Options, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        model_config("x", versions, signature, sample=None, options=options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Options(instances=1025),
        lambda: Options(threads=4097),
        lambda: Options(threads=-1),
        lambda: Options(ENSEMBLE, max_inflight=2**31, server_version="2.71.0"),
        lambda: Options(server_version="newest"),
        lambda: Options(tags={"team": "\ud800"}),
        lambda: Queue(size=2**31),
        lambda: Queue(timeout_us=2**63),
        lambda: Batching((2**31,)),
        lambda: Batching(delay_us=2**63),
        lambda: Batching(queue_size=-1),
        lambda: Batching(timeout_us=-1),
        lambda: Batching(priorities=2**31, default_priority=1),
        lambda: Sequences(idle_us=2**63),
        lambda: Sequences(candidates=2**31),
        lambda: RateLimit(priority=2**31),
        lambda: RateLimit((Resource("decoder", 2**31),)),
    ],
)
def test_what_a_configuration_cannot_hold_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InputError, match=r"at most|sizes|server version|UTF-8|priority"):
        make()


def test_the_largest_values_can_be_written() -> None:
    batching = Batching((), 2**63 - 1, 2**31 - 1, 2**63 - 1, priorities=2**31 - 1, default_priority=1)
    limit = RateLimit((Resource("decoder", 2**31 - 1),), 2**31 - 1)
    options = Options("onnxruntime", instances=1024, threads=4096, batching=batching, limit=limit)
    assert options_of(own_config("x", SIGNATURE, options)) == options
    sequences = Options(batching=Sequences(2**63 - 1, 2**31 - 1, (), 2**63 - 1))
    assert options_of(own_config("x", SIGNATURE, sequences)) == sequences


def test_a_configuration_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_bytes(b'name: "\xff"')
    with pytest.raises(InputError, match="not a model configuration"):
        read_config(tmp_path / "config.pbtxt")


def test_a_typing_error_in_a_config_is_found_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "config.pbtxt").write_text('name: "x"\nmax_batchsize: 3\n')
    with pytest.raises(InputError, match=r"2:1.*max_batchsize"):
        read_config(tmp_path / "config.pbtxt")


def test_options_of_a_configuration_that_is_not_ours_are_refused() -> None:
    config = own_config("x", SIGNATURE, Options())
    config.backend = "vllm"
    with pytest.raises(InputError, match="not one that gpuops wrote"):
        options_of(config)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server of all golden files for 2.51 that it has backends for, of real models."""
    torch = pytest.importorskip("torch", reason="python-pt2 and python-aoti are run by torch, which is not installed")
    folder = tmp_path_factory.mktemp("loaded")
    bundle = make_bundle(folder / "bundle")
    write_torch_models(torch, bundle)
    repository = folder / "repository"
    deploy(bundle, repository, name="step")
    for name in LOADED:
        options = CASES["2.51.0"][name]
        deploy(
            bundle_for(folder / name, options, repository) if options.backend == ENSEMBLE else bundle,
            repository,
            name=name,
            options=options,
        )
    with TritonServer(repository, log=folder / "log", start_timeout_s=400) as server:
        yield server


def write_torch_models(torch: Any, bundle: Path) -> None:
    """Beside the tiny bundle's ONNX graph, the same one as "int8", exported program and AOTInductor package."""

    class Tiny(torch.nn.Module):
        def forward(self, a: Any, m: Any) -> Any:
            table = torch.linspace(-1.0, 1.0, 12)
            return ((0.5 * a.float()).sum(dim=1, keepdim=True) + table[m.long()].reshape(-1, 1, 1, 1),)

    inputs = {name: torch.from_numpy(array) for name, array in golden().batch(SIGNATURE.max_batch).inputs.items()}
    batch = torch.export.Dim("batch", min=1, max=SIGNATURE.max_batch)
    shapes = {name: {0: batch} for name in inputs}
    program = torch.export.export(Tiny(), (inputs["a"], inputs["m"]), dynamic_shapes=shapes)
    torch.export.save(program, bundle / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=str(bundle / "model_aoti.pt2"))
    shutil.copyfile(bundle / "model.onnx", bundle / "model_int8.onnx")
    manifest = {**read_bundle(bundle).manifest, "int8": {"tolerance": 0.5}}
    write_manifest(bundle, {key: value for key, value in manifest.items() if key != "sha256"})


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++, which is not installed")
@pytest.mark.parametrize("name", LOADED)
def test_what_a_golden_file_describes_is_loaded_and_answers(loaded: TritonServer, name: str) -> None:
    output = "z" if name == "ensemble" else "y"
    with Client(loaded.http_url) as client:
        for size in range(1, SIGNATURE.max_batch + 1):
            asked = golden(seed=size).batch(size).inputs
            np.testing.assert_allclose(
                client.infer(name, asked)[output], answers(asked["a"], asked["m"][:, 0]), atol=1e-3
            )


if __name__ == "__main__":  # writes the golden files anew: to be read before they are committed
    import tempfile

    for version, name in CASE_LIST:
        file = GOLDEN / version / f"{name}.pbtxt"
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            file.write_text(header(version, name) + deployed_config(Path(folder), name, CASES[version][name]))
    (GOLDEN / "2.51.0" / "own-sequences.pbtxt").write_text(own_text())
