"""Ensembles: bundles that join served models, deployed, kept, rolled back and proved like any other."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tiny_bundle import SAMPLE, SIGNATURE, answers, make_bundle
from tiny_bundle import golden as tiny_golden

from gpuops.bundle import Golden, read_bundle, write_manifest
from gpuops.errors import InputError, IntegrityError
from gpuops.signing import keygen, sign
from gpuops.spec import Signature, TensorSpec
from gpuops_serving.client import Client
from gpuops_serving.config import Options, read_config
from gpuops_serving.ensemble import ensemble_bundle
from gpuops_serving.repository import deploy, served_versions, withdraw
from gpuops_serving.scheduling import Batching, RateLimit, Step
from gpuops_serving.server import TritonServer
from gpuops_serving.trust import check_repository

TINY = Step("tiny", {"a": "a", "m": "m"}, {"y": "field"})
SCALE = Step("scale", {"x": "field"}, {"z": "z"})


def scale_bundle(path: Path, *, version_id: str = "5" * 64, factor: float = 2.0, max_batch: int = 4) -> Path:
    """A bundle of one node: z = factor * x."""
    path.mkdir(parents=True)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "factor"], ["z"])],
        "scale",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [onnx.numpy_helper.from_array(np.float32(factor), "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path / "model.onnx")
    x = tiny_golden().outputs["y"]
    Golden({"x": x}, {"z": (factor * x).astype(np.float32)}).save(path / "golden.npz")
    signature = Signature((TensorSpec("x", "float32", (1, 8, 8)),), (TensorSpec("z", "float32", (1, 8, 8)),), max_batch)
    manifest = read_bundle(make_bundle(path.parent / f"{path.name}-like")).manifest
    document = {**manifest, "name": "scale", "version_id": version_id, "signature": signature.to_json(), "sample": None}
    write_manifest(path, {key: value for key, value in document.items() if key not in ("sha256", "files")})
    return path


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository that serves the two steps."""
    deploy(make_bundle(tmp_path / "tiny"), tmp_path / "models")
    deploy(scale_bundle(tmp_path / "scale"), tmp_path / "models")
    return tmp_path / "models"


def chain_golden(factor: float = 2.0) -> Golden:
    found = tiny_golden()
    return Golden(found.inputs, {"z": (factor * found.outputs["y"]).astype(np.float32)})


def chain(repository: Path, path: str = "chain", *steps: Step, **how: Any) -> Path:
    return ensemble_bundle(repository.parent / path, repository, "chain", steps or (TINY, SCALE), chain_golden(), **how)


def test_what_crosses_its_wire_follows_from_its_steps(repository: Path) -> None:
    bundle = read_bundle(chain(repository))
    signature = bundle.signature
    assert signature.inputs == SIGNATURE.inputs
    assert [(spec.name, spec.shape) for spec in signature.outputs] == [("z", (1, 8, 8))]
    assert signature.max_batch == 4  # the smaller of 5 and 4
    assert bundle.manifest["sample"] == SAMPLE  # of the one step that takes its inputs
    assert [step["version_id"][0] for step in bundle.manifest["ensemble"]] == ["1", "5"]
    assert chain(repository, "reversed", SCALE, TINY).is_dir()  # data flow, not the order of writing


def test_its_version_id_is_that_of_its_steps_and_how_they_are_joined(repository: Path, tmp_path: Path) -> None:
    first = read_bundle(chain(repository, "one")).version_id
    assert read_bundle(chain(repository, "two")).version_id == first
    both = read_bundle(
        ensemble_bundle(
            tmp_path / "both",
            repository,
            "chain",
            [TINY, SCALE],
            Golden(chain_golden().inputs, {"z": chain_golden().outputs["z"], "field": tiny_golden().outputs["y"]}),
            outputs=["z", "field"],
        )
    )
    assert [spec.name for spec in both.signature.outputs] == ["z", "field"]
    deploy(scale_bundle(tmp_path / "scale2", version_id="6" * 64), repository)
    assert len({first, both.version_id, read_bundle(chain(repository, "three")).version_id}) == 3


def test_a_deployed_ensemble_names_versions_and_they_stay_served(repository: Path, tmp_path: Path) -> None:
    made = deploy(chain(repository), repository, options=Options(tags={"team": "weather"}))
    config = read_config(repository / "chain" / "config.pbtxt")
    assert (config.platform, config.backend, len(config.instance_group)) == ("ensemble", "", 0)
    assert [(step.model_name, step.model_version) for step in config.ensemble_scheduling.step] == [
        ("tiny", 1),
        ("scale", 1),
    ]
    assert dict(config.metric_tags) == {"team": "weather"}
    assert sorted(path.name for path in made.path.iterdir()) == ["golden.npz", "manifest.json"]
    for number in (2, 3):
        deploy(scale_bundle(tmp_path / f"scale{number}", version_id=f"{number}" * 64), repository)
    served = [(found.name, found.version) for found in served_versions(repository)]
    assert served == [("chain", 1), ("scale", 1), ("scale", 2), ("scale", 3), ("tiny", 1)]


def test_a_new_ensemble_takes_the_newest_and_the_old_one_lets_go(repository: Path, tmp_path: Path) -> None:
    deploy(chain(repository), repository)
    deploy(scale_bundle(tmp_path / "scale2", version_id="6" * 64), repository)
    made = deploy(chain(repository, "again"), repository)
    assert (made.version, made.kept) == (2, ())  # one configuration cannot describe both
    config = read_config(repository / "chain" / "config.pbtxt")
    assert [step.model_version for step in config.ensemble_scheduling.step] == [1, 2]
    deploy(scale_bundle(tmp_path / "scale3", version_id="7" * 64), repository)
    served = [found.version for found in served_versions(repository) if found.name == "scale"]
    assert served == [2, 3]  # 1 is named by no ensemble any more


def test_rolling_an_ensemble_back_brings_its_steps_back(repository: Path, tmp_path: Path) -> None:
    deploy(chain(repository), repository)
    deploy(scale_bundle(tmp_path / "scale2", version_id="6" * 64), repository)
    deploy(chain(repository, "again"), repository)
    assert withdraw(repository / "chain", 2) == [1]
    config = read_config(repository / "chain" / "config.pbtxt")
    assert [step.model_version for step in config.ensemble_scheduling.step] == [1, 1]
    assert [found.version for found in served_versions(repository) if found.name == "chain"] == [1]


def test_an_ensemble_of_what_is_not_served_there_is_refused(repository: Path, tmp_path: Path) -> None:
    bundle = chain(repository)
    deploy(make_bundle(tmp_path / "other", version_id="9" * 64), tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"does not serve version 1 \(111111111111\) of 'tiny'.*deploy that first"):
        deploy(bundle, tmp_path / "elsewhere")
    with pytest.raises(InputError, match="does not serve version any of 'ghost'"):
        chain(repository, "x", TINY, dataclasses.replace(SCALE, model="ghost"))
    with pytest.raises(InputError, match="does not serve version 3 of 'scale'"):
        chain(repository, "x", TINY, dataclasses.replace(SCALE, version=3))


@pytest.mark.parametrize(
    ("steps", "how", "says"),
    [
        ((TINY, Step("scale", {"x": "a"}, {"z": "z"})), {}, r"'a' is uint8 \[3, 8, 8\], and 'x' of 'scale' takes"),
        ((TINY, Step("scale", {"q": "field"}, {"z": "z"})), {}, "input 'x' of 'scale' gets nothing"),
        ((TINY, Step("scale", {"x": "field", "q": "a"}, {"z": "z"})), {}, "'scale' has no input 'q'"),
        ((TINY, Step("scale", {"x": "field"}, {"q": "z"})), {}, "'scale' has no output 'q'"),
        ((TINY, Step("scale", {"x": "field"}, {"z": "field"})), {}, "two steps answer 'field'"),
        ((Step("tiny", {"a": "a"}, {"y": "field"}), SCALE), {}, "input 'm' of 'tiny' gets nothing"),
        ((Step("scale", {"x": "z"}, {"z": "z"}),), {}, "only feed each other"),
        ((TINY, Step("scale", {"x": "loop"}, {"z": "loop"})), {"outputs": ["field"]}, "'scale' waits for its own"),
        ((TINY, SCALE), {"outputs": ["nothing"]}, "no step answers 'nothing'"),
        ((TINY, SCALE), {"outputs": ["field"]}, "nobody takes 'z'"),
        ((TINY,), {}, "output 'field' is not both in the steps and the golden answers"),
        ((TINY, SCALE), {"golden": Golden({}, {})}, "takes 'a', the golden samples have"),
    ],
)
def test_steps_that_do_not_fit_are_refused(
    repository: Path, steps: tuple[Step, ...], how: dict[str, Any], says: str
) -> None:
    golden = how.pop("golden", chain_golden())
    with pytest.raises(InputError, match=says):
        ensemble_bundle(repository.parent / "x", repository, "chain", steps, golden, **how)
    assert not (repository.parent / "x").exists()


def test_options_that_an_ensemble_has_not_are_refused(repository: Path) -> None:
    bundle = chain(repository)
    for how in ({"instances": 2}, {"gpu": True}, {"threads": 3}, {"limit": RateLimit()}, {"batching": Batching((2,))}):
        with pytest.raises(InputError, match="an ensemble has no"):
            deploy(bundle, repository, options=Options(**how))


def test_an_ensemble_is_signed_like_any_bundle(repository: Path, tmp_path: Path) -> None:
    keygen(tmp_path / "key", tmp_path / "key.pub")
    keys = [tmp_path / "key.pub"]
    for name in ("tiny", "scale"):
        sign(tmp_path / name, tmp_path / "key")
        deploy(tmp_path / name, repository, keys=keys)
    bundle = chain(repository)
    with pytest.raises(IntegrityError, match="not signed"):
        deploy(bundle, repository, keys=keys)
    sign(bundle, tmp_path / "key")
    deploy(bundle, repository, keys=keys)
    assert [found.name for found in served_versions(repository, keys=keys)] == ["chain", "scale", "tiny"]
    check_repository(repository, keys)


@pytest.mark.slow
def test_a_server_answers_an_ensemble_and_goes_on_when_a_step_gets_a_new_version(
    repository: Path, tmp_path: Path
) -> None:
    deploy(chain(repository), repository)
    with TritonServer(repository, control=True) as server, Client(server.http_url, access=server.access) as client:
        for size in (1, 4):
            asked = tiny_golden(seed=size).batch(size).inputs
            wanted = 2.0 * answers(asked["a"], asked["m"][:, 0])
            np.testing.assert_allclose(client.infer("chain", asked)["z"], wanted, atol=1e-3)
        deploy(scale_bundle(tmp_path / "scale2", version_id="6" * 64, factor=3.0), repository)
        client.load("scale")
        asked = tiny_golden(seed=9).batch(2).inputs
        y = answers(asked["a"], asked["m"][:, 0])
        np.testing.assert_allclose(client.infer("chain", asked)["z"], 2.0 * y, atol=1e-3)  # the version it names
        np.testing.assert_allclose(client.infer("scale", {"x": y.astype(np.float32)})["z"], 3.0 * y, atol=1e-3)
        deploy(ensemble_bundle(tmp_path / "new", repository, "chain", [TINY, SCALE], chain_golden(3.0)), repository)
        client.load("chain")
        np.testing.assert_allclose(client.infer("chain", asked)["z"], 3.0 * y, atol=1e-3)
