"""Every rule finds a minimal repository of its own, at its place; the errors are what Triton 2.51 refuses too."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import CASES as SERVED
from test_config import deployed_config
from tiny_bundle import make_bundle

from gpuops.errors import GpuopsError, InputError
from gpuops_serving.client import Client
from gpuops_serving.gates import MAY_2026
from gpuops_serving.lint import lint
from gpuops_serving.lint.rules import ERROR, RULES, Finding
from gpuops_serving.repository import deploy
from gpuops_serving.server import TritonServer

SAFE = "2.75.0"
"""A server that nothing is known against."""
OLD = "2.51.0"
IO = """input [ { name: "x" data_type: TYPE_FP32 dims: [ 2 ] } ]
output [ { name: "y" data_type: TYPE_FP32 dims: [ 2 ] } ]
"""
BASE = f'backend: "python"\nmax_batch_size: 4\n{IO}'
JOIN = f'platform: "ensemble"\nmax_batch_size: 4\n{IO}'
STEP = 'model_name: "ok" model_version: -1 input_map { key: "x" value: "x" } output_map { key: "y" value: "y" }'
PYTHON = """import triton_python_backend_utils as pb
def answer(request):
    return pb.InferenceResponse([pb.Tensor.from_dlpack("y", pb.get_input_tensor_by_name(request, "x"))])
class TritonPythonModel:
    def execute(self, requests):
        return [answer(request) for request in requests]
"""
ANSWER = "return [answer(request) for request in requests]"
WARM = (
    'model_warmup [ { name: "w" batch_size: 1 inputs { key: "x" value { data_type: TYPE_FP32 dims: [ 2 ] %s } } } ]\n'
)


@dataclass(frozen=True)
class Case:
    """A model folder that one rule is about."""

    code: str
    config: str | None
    """Text of its config.pbtxt; None for none."""
    line: int | None = None
    """Line of config.pbtxt where it is found, if it is there."""
    files: Mapping[str, str] = field(default_factory=lambda: {"1/model.py": PYTHON})
    """Its other files; a folder if the name ends with a slash."""
    refused: bool | None = None
    """Whether Triton 2.51 refuses it; None where that cannot be seen here: another backend, or it never ends."""
    version: str = SAFE
    gpus: int = 0
    flags: tuple[str, ...] | None = None
    says: str = ""

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        if self.config is not None:
            (folder / "config.pbtxt").write_text(self.config)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                (folder / name).mkdir()
            else:
                (folder / name).write_text(content)


def model(code: str, more: str = "", **how: object) -> Case:
    """A Python model with something more in its configuration, on line 5."""
    return Case(code, BASE + more, **{"line": 5, **how})  # type: ignore[arg-type]


def joined(code: str, config: str, **how: object) -> Case:
    """An ensemble."""
    return Case(code, config, **{"files": {"1/": ""}, "refused": True, **how})  # type: ignore[arg-type]


def steps(*each: str, more: str = "") -> str:
    """An ensemble of steps, each on a line of its own from line 6 on."""
    return JOIN + "ensemble_scheduling {\n" + "".join(f"step {{ {step} }}\n" for step in each) + more + "}\n"


DYNAMIC = "dynamic_batching { %s }\n"
SEQUENCE = "sequence_batching { %s }\n"
CONTROL = "control_input [ { name: %s control [ { kind: CONTROL_SEQUENCE_%s } ] } ]"
START = '"S"', "START int32_false_true: [ 0, 1 ]"
AOTI = 'platform: "torch_aoti"\nmax_batch_size: 4\n' + IO.replace('"x"', '"INPUT__0"').replace('"y"', '"RESULT[0]"')
PACKAGE = {"1/model.pt2": ""}

CASES = {
    "text": model("GT101", "input [ {\n", line=5, refused=True, says="refuses the whole model"),
    "oneof": model(
        "GT101", "dynamic_batching { } sequence_batching { }\n", refused=True, says="another member of oneof"
    ),
    "twice": model("GT101", "max_batch_size: 2\n", refused=True),
    "bytes": Case("GT101", "\udcff", refused=True),
    "typo": model("GT102", "max_batchsize: 3\n", refused=True, says="there is no ModelConfig.max_batchsize"),
    "typo-inside": Case("GT102", BASE.replace("dims: [ 2 ]", "dimms: 2 dims: 2", 1), 3, refused=True),
    "metrics": model("GT103", "model_metrics { }\n", version=OLD, refused=True, says="take container 24.11"),
    "inflight": joined("GT103", steps(STEP, more="max_inflight_requests: 3\n"), line=7, version=OLD),
    "aoti-old": Case("GT103", AOTI, 1, PACKAGE, refused=True, version=OLD, says="runs no AOTInductor"),
    "aoti-batch": Case("GT103", AOTI, 2, PACKAGE, version="2.70.0", says="no batches in torch_aoti.*26.07"),
    "aoti-bf16": Case("GT103", AOTI.replace("FP32", "BF16", 1), 3, PACKAGE, version="2.74.0", says=r"BF16.*26\.11"),
    "other-name": Case("GT104", f'name: "another"\n{BASE}', 1, refused=True, says="make them the same"),
    "no-backend": Case("GT105", BASE.replace('backend: "python"\n', ""), files={"1/weights": ""}, refused=True),
    "platform": Case("GT105", BASE.replace("backend", "platform"), 1, files={"1/weights": ""}, refused=True),
    "no-config": Case("GT106", None, refused=True, says="config.pbtxt is missing"),
    "aoti-config": Case("GT106", None, files=PACKAGE, says="nothing completes them"),
    "aoti-io": Case("GT106", 'platform: "torch_aoti"\n', files=PACKAGE),
    "script-io": Case("GT106", 'platform: "pytorch_libtorch"\n', files={"1/model.pt": ""}),
    "not-completed": Case(
        "GT106", 'backend: "onnxruntime"\n', files={"1/model.onnx": ""}, flags=("--disable-auto-complete-config",)
    ),
    "completed": Case("GT107", 'backend: "onnxruntime"\n', files={"1/model.onnx": ""}, says="guesses what batches"),
    "completes-itself": Case("GT107", None, files={"1/model.py": PYTHON + "    def auto_complete_config(c): ...\n"}),
    "cache": model("GT108", "response_cache { enable: true }\n", refused=False, says="--cache-config=local"),
    "limiter": model("GT109", "instance_group [ { rate_limiter { priority: 2 } } ]\n", refused=False),
    "agent": model("GT110", 'model_repository_agents { agents [ { name: "checksum" } ] }\n', refused=True),
    "no-dims": Case("GT201", BASE.replace("dims: [ 2 ]", "", 1), 3, refused=True, says="input 'x' has no dims"),
    "no-type": Case("GT201", BASE.replace("data_type: TYPE_FP32", "", 1), 3, refused=True),
    "no-name": Case("GT201", BASE.replace('name: "y"', ""), 4, refused=True, says="output 0 has no name"),
    "zero": Case("GT202", BASE.replace("[ 2 ]", "[ 0 ]", 1), 3, refused=True),
    "minus-two": Case("GT202", BASE.replace("[ 2 ]", "[ -2 ]", 1), 3, refused=True),
    "reshape": Case("GT203", BASE.replace("[ 2 ]", "[ 2 ] reshape { shape: [ 3 ] }", 1), 3, refused=True),
    "reshape-free": Case("GT203", BASE.replace("[ 2 ]", "[ 2, -1 ] reshape { shape: [ -1, 2 ] }", 1), 3, refused=True),
    "negative": Case("GT204", BASE.replace("size: 4", "size: -1"), 2, refused=True),
    "no-batch": Case("GT205", BASE.replace("size: 4", "size: 0") + DYNAMIC % "", 5, refused=False),
    "preferred": model("GT206", DYNAMIC % "preferred_batch_size: [ 2, 8 ]", refused=True, says="preferred batch 8"),
    "preferred-0": model("GT206", DYNAMIC % "preferred_batch_size: [ 0 ]", refused=True),
    "preferred-sequence": model("GT206", SEQUENCE % "oldest { preferred_batch_size: [ 9 ] }", refused=True),
    "two-inputs": model("GT207", IO.splitlines()[0] + "\n", refused=False),
    "aoti-name": Case("GT208", AOTI.replace("INPUT__0", "x"), 3, PACKAGE, says="INPUT__0, or as its call"),
    "aoti-spec": Case("GT208", AOTI, 4, PACKAGE, version="2.68.0", says=r"'RESULT\[0\]'"),
    "no-default": model("GT301", DYNAMIC % "priority_levels: 2", refused=True, says="0 of 2"),
    "beyond": model("GT301", DYNAMIC % "priority_levels: 2 default_priority_level: 3", refused=True),
    "policy": model(
        "GT301",
        DYNAMIC % "priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 value { } }",
        refused=True,
    ),
    "order": model(
        "GT302", DYNAMIC % "priority_levels: 2 default_priority_level: 1 preserve_ordering: true", refused=True
    ),
    "order-late": model(
        "GT302",
        DYNAMIC
        % "preserve_ordering: true default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 5 }",
        refused=True,
    ),
    "cached-sequence": model("GT303", "response_cache { enable: true }\n" + SEQUENCE % "", refused=True),
    "cached-stream": model(
        "GT303", "response_cache { enable: true }\nmodel_transaction_policy { decoupled: true }\n", refused=True
    ),
    "stream": model("GT304", DYNAMIC % "" + "model_transaction_policy { decoupled: true }\n", refused=False),
    "two-starts": model("GT305", SEQUENCE % (CONTROL % START + CONTROL % ('"T"', START[1])), refused=True),
    "no-values": model("GT305", SEQUENCE % (CONTROL % ('"S"', "START")), refused=True),
    "float-id": model("GT305", SEQUENCE % (CONTROL % ('"S"', "CORRID data_type: TYPE_FP32")), refused=True),
    "no-control-name": model("GT305", SEQUENCE % (CONTROL % ('""', START[1])), refused=True),
    "slots": model("GT306", SEQUENCE % "direct { minimum_slot_utilization: 2 }", refused=True),
    "no-levels": model("GT307", DYNAMIC % "default_priority_level: 1", refused=False),
    "gpu": model("GT401", "instance_group [ { kind: KIND_GPU } ]\n", refused=True, says="the server has none"),
    "gpu-2": model("GT401", "instance_group [ { kind: KIND_GPU gpus: [ 2 ] } ]\n", gpus=2, says="GPU 2, and .* has 2"),
    "cpu-gpus": model("GT402", "instance_group [ { kind: KIND_CPU gpus: [ 0 ] } ]\n", refused=True),
    "cpu": model("GT403", "instance_group [ { kind: KIND_CPU } ]\n", gpus=1, refused=False),
    "profile": model("GT404", 'instance_group [ { kind: KIND_CPU profile: [ "0" ] } ]\n', refused=True),
    ".git": Case("GT501", None, files={"HEAD": ""}, refused=True),
    "empty": Case("GT501", None, files={}, refused=True),
    "no-version": Case("GT502", BASE, files={}, refused=True, says="make a folder 1"),
    "none-left": model("GT502", "version_policy { specific { versions: [ 3 ] } }\n", line=None, refused=True),
    "backup": Case("GT503", BASE, files={"1/model.py": PYTHON, "2.bak/model.py": PYTHON}, says="can hang it"),
    "v1": Case("GT504", BASE, files={"1/model.py": PYTHON, "v2/model.py": PYTHON}, refused=False, says="no number"),
    "01": Case("GT504", BASE, files={"1/model.py": PYTHON, "02/model.py": PYTHON}, refused=False, says="begins with 0"),
    "absent": model("GT505", "version_policy { specific { versions: [ 1, 3 ] } }\n", refused=False),
    "no-file": Case("GT506", BASE, files={"1/": ""}, says="waits for it for ever"),
    "no-onnx": Case("GT506", BASE.replace("python", "onnxruntime"), files={"1/other.onnx": ""}),
    "named-file": model("GT506", 'default_model_filename: "other.py"\n', line=None),
    "no-labels": Case("GT507", BASE.replace('name: "y"', 'name: "y" label_filename: "labels.txt"'), 4, refused=True),
    "no-sample": model("GT507", WARM % 'input_data_file: "nope"', refused=True, says="'nope' of 'x'"),
    "short-sample": model(
        "GT508",
        WARM % 'input_data_file: "raw"',
        files={"1/model.py": PYTHON, "warmup/raw": "abc"},
        refused=True,
        says="needs 8 bytes and 'raw' has 3",
    ),
    "no-data": model("GT508", WARM % "", refused=True, says="choose one"),
    "other-type": model("GT508", (WARM % "zero_data: true").replace("FP32", "INT8"), refused=True),
    "other-dims": model("GT508", (WARM % "zero_data: true").replace("[ 2 ]", "[ 3 ]"), refused=True),
    # Triton 2.51 refuses it, or dies of it (signal 11, one time in three), so the server below is spared.
    "large-warm-up": model("GT508", (WARM % "zero_data: true").replace("size: 1", "size: 9"), says="2.51 may die of"),
    "unknown-input": model("GT508", (WARM % "zero_data: true").replace('"x"', '"q"'), refused=True),
    "bytecode": Case("GT509", BASE, files={"1/model.py": PYTHON, "1/__pycache__/": ""}, refused=False),
    "numpy-out": Case(
        "GT601", BASE, files={"1/model.py": PYTHON.replace(ANSWER, 'return [pb.Tensor("y", None)]')}, refused=False
    ),
    "numpy-in": Case(
        "GT601", BASE, files={"1/model.py": PYTHON.replace(ANSWER, "return [r.as_numpy() for r in requests]")}
    ),
    "no-python": Case("GT602", BASE, files={"1/model.py": "def x(:\n"}, refused=True, says="no Python"),
    "no-class": Case("GT602", BASE, files={"1/model.py": "x = 1\n"}, refused=True, says="no class"),
    "no-execute": Case("GT602", BASE, files={"1/model.py": "class TritonPythonModel:\n    pass\n"}, refused=False),
    "parameters": Case(
        "GT603",
        BASE,
        files={"1/model.py": PYTHON.replace(ANSWER, "return [pb.InferenceResponse([], parameters={})]")},
        version=OLD,
        says=r"container 25\.02",
    ),
    "environment": model(
        "GT604", 'parameters { key: "EXECUTION_ENV_PATH" value { string_value: "/nowhere/env" } }\n', refused=True
    ),
    "no-platform": joined(
        "GT701", BASE + f"ensemble_scheduling {{ step {{ {STEP} }} }}\n", files={"1/model.py": PYTHON}
    ),
    "no-steps": joined("GT701", JOIN, line=1),
    "empty-steps": joined("GT701", JOIN + "ensemble_scheduling { }\n", line=5),
    "ensemble-backend": joined("GT701", steps(STEP) + 'backend: "python"\n', line=8),
    "ensemble-instances": joined("GT701", steps(STEP) + "instance_group [ { kind: KIND_CPU } ]\n", line=8),
    "ensemble-optimization": joined("GT701", steps(STEP) + "optimization { }\n", line=8),
    "ensemble-warm-up": joined("GT701", steps(STEP) + WARM % "zero_data: true", line=8),
    "no-model": joined("GT701", steps(STEP.replace('model_name: "ok"', "")), line=6, says="no model_name"),
    "no-input-map": joined("GT701", steps(re.sub(r"input_map \{.*?\}", "", STEP)), line=6),
    "itself": joined("GT701", steps(STEP.replace("ok", "itself")), line=6, says="depends on itself"),
    "lonely": joined("GT702", steps(STEP.replace("ok", "ghost")), line=6, says="'ghost' is not in this repository"),
    "step-version": joined("GT703", steps(STEP.replace("-1", "7")), line=6),
    "no-step-version": joined("GT703", steps(STEP.replace("model_version: -1", "")), line=6, says="left out"),
    "map-input": joined("GT704", steps(STEP.replace('key: "x"', 'key: "q"')), line=6, says="no input 'q'"),
    "map-output": joined("GT704", steps(STEP.replace('key: "y"', 'key: "q"')), line=6, says="no output 'q'"),
    "nobody-writes": joined("GT705", steps(STEP.replace('value: "x"', 'value: "z"')), line=6),
    "nobody-reads": joined("GT705", steps(STEP.replace('value: "y"', 'value: "z"')), line=6, says="never used"),
    "two-write": joined("GT705", steps(STEP, STEP), line=7, says="written twice"),
    "circle": joined(
        "GT705",
        steps(
            STEP,
            STEP.replace('value: "x"', 'value: "b"').replace('value: "y"', 'value: "a"'),
            STEP.replace('value: "x"', 'value: "a"').replace('value: "y"', 'value: "b"'),
        ),
        line=7,
        says="waits for this step itself",
    ),
    "type": joined("GT706", steps(STEP).replace("TYPE_FP32", "TYPE_INT8", 1), line=6, says="TYPE_INT8"),
    "dims": joined("GT706", steps(STEP).replace("[ 2 ]", "[ 3 ]", 1), line=6),
    "large": joined("GT707", steps(STEP).replace("size: 4", "size: 9"), line=2, says="take the smallest"),
}
SERVER_RULES = ("GT001", "GT002", "GT003", "GT004", "GT005")
"""Rules about the server rather than a model."""


def repository(folder: Path, case: Case, name: str) -> Path:
    """A repository of a good model and the case's."""
    Case("", BASE).write(folder / "ok")
    case.write(folder / name) if case.config != "\udcff" else _bytes(folder / name)
    return folder


def _bytes(folder: Path) -> None:
    Case("", "").write(folder)
    (folder / "config.pbtxt").write_bytes(b'name: "\xff\xfe"\n')


@pytest.mark.parametrize("name", CASES)
def test_a_rule_finds_its_case_and_nothing_in_the_good_model(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    found = lint(repository(tmp_path, case, name), case.version, gpus=case.gpus, flags=case.flags)
    found = [finding for finding in found if finding.place != "tritonserver"]
    assert {finding.place.partition("/")[0] for finding in found} == {name}
    hits = [finding for finding in found if finding.code == case.code]
    assert hits, found
    assert all(finding.severity == RULES[case.code][0] for finding in hits)
    assert any(re.search(case.says, finding.message) for finding in hits), hits
    if case.line is not None:
        assert any(re.match(rf"{re.escape(name)}/config\.pbtxt:{case.line}(:|$)", finding.place) for finding in hits), (
            hits
        )


@pytest.mark.parametrize("name", CASES)
def test_a_rule_says_what_to_do(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    for finding in lint(repository(tmp_path, case, name), case.version, gpus=case.gpus, flags=case.flags):
        assert re.search(r"[:;,?] .|\?$", finding.message), finding
        assert "\n" not in finding.message


def test_every_rule_has_a_case() -> None:
    assert {*(case.code for case in CASES.values()), *SERVER_RULES, "GT510"} == set(RULES)


def test_the_documentation_names_every_code_with_its_severity() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving-repository.md").read_text()
    rows = re.findall(r"^\| (GT[0-9]{3}) \| (error|warning) \| (.+) \|$", text, re.MULTILINE)
    assert {code: (severity, what) for code, severity, what in rows} == RULES


@pytest.mark.parametrize(
    ("flags", "codes"),
    [
        (("--model-control-mode=explicit",), {"GT002"}),
        (("--model-control-mode=explicit", "--http-restricted-api=model-repository:k=v"), {"GT002"}),
        (
            (
                "--model-control-mode=explicit",
                "--http-restricted-api=model-repository:k=v",
                "--grpc-restricted-protocol=logging,model-repository:k=v",
            ),
            set(),
        ),
        (("--model-control-mode=poll",), {"GT003"}),
        (("--model-control-mode=none", "--disable-auto-complete-config"), set()),
        (("--disable-auto-complete-config=true",), {"GT005"}),
        (("--http-address=0.0.0.0",), {"GT004"}),
    ],
)
def test_flags_of_the_server_are_looked_at(tmp_path: Path, flags: tuple[str, ...], codes: set[str]) -> None:
    safe = [f"--{part}-address=127.0.0.1" for part in ("http", "grpc", "metrics")]
    given = [flag for flag in safe if flag.partition("=")[0] not in {f.partition("=")[0] for f in flags}]
    Case("", BASE).write(tmp_path / "ok")
    assert {finding.code for finding in lint(tmp_path, SAFE, flags=[*flags, *given])} == codes
    assert len([finding for finding in lint(tmp_path, SAFE, flags=flags) if finding.code == "GT004"]) == 3


def test_a_flag_that_is_there_is_not_asked_for(tmp_path: Path) -> None:
    limited = "instance_group [ { rate_limiter { priority: 2 } } ]\nresponse_cache { enable: true }\n"
    Case("", BASE + limited).write(tmp_path / "ok")
    local = [f"--{part}-address=127.0.0.1" for part in ("http", "grpc", "metrics")]
    assert [f.code for f in lint(tmp_path, SAFE, flags=local)] == ["GT109", "GT108"]
    assert lint(tmp_path, SAFE, flags=[*local, "--cache-config=local,size=1", "--rate-limit=execution_count"]) == []


def test_an_old_server_is_warned_of(tmp_path: Path) -> None:
    Case("", BASE).write(tmp_path / "ok")
    (old,) = lint(tmp_path, OLD)
    assert (old.code, old.severity, old.place) == ("GT001", "warning", "tritonserver")
    assert lint(tmp_path, ".".join(map(str, MAY_2026))) == []


def test_a_model_that_everybody_may_change_is_found(tmp_path: Path) -> None:
    Case("", BASE).write(tmp_path / "ok")
    (tmp_path / "ok" / "1" / "model.py").chmod(0o666)
    (open_to_all,) = lint(tmp_path, SAFE)
    assert (open_to_all.code, open_to_all.place) == ("GT510", "ok/1/model.py")
    (tmp_path / "ok" / "1" / "model.py").chmod(0o664)
    assert lint(tmp_path, SAFE) == []


def test_a_gpu_that_is_there_is_no_finding(tmp_path: Path) -> None:
    Case("", BASE + "instance_group [ { kind: KIND_GPU gpus: [ 1 ] } ]\n").write(tmp_path / "ok")
    assert lint(tmp_path, SAFE, gpus=2) == []


def test_findings_come_by_file_and_line_and_as_json(tmp_path: Path) -> None:
    text = BASE + 'max_batchsize: 1\nbackendd: "x"\n' + DYNAMIC % "preferred_batch_size: [ 9 ]"
    Case("", text).write(tmp_path / "b")
    Case("", BASE.replace("size: 4", "size: -1")).write(tmp_path / "a")
    found = lint(tmp_path, SAFE)
    assert [(f.code, f.place) for f in found] == [
        ("GT204", "a/config.pbtxt:2:1"),
        ("GT102", "b/config.pbtxt:5:1"),
        ("GT102", "b/config.pbtxt:6:1"),
        ("GT206", "b/config.pbtxt:7:20"),
    ]
    assert found[0].to_json() == {
        "code": "GT204",
        "severity": "error",
        "place": "a/config.pbtxt:2:1",
        "message": found[0].message,
    }


@pytest.mark.parametrize("version", SERVED)
def test_what_deploy_writes_is_clean(tmp_path: Path, version: str) -> None:
    for name, options in SERVED[version].items():
        deployed_config(tmp_path / name, name, options)
        flags = ["--cache-config=local,size=9", "--rate-limit=execution_count"]
        flags += [f"--{part}-address=127.0.0.1" for part in ("http", "grpc", "metrics")]
        found = lint(tmp_path / name / "repository", version, gpus=int(options.gpu), flags=flags)
        assert [finding for finding in found if finding.code != "GT001"] == []


def test_two_versions_and_a_trial_of_ours_are_clean(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        deploy(make_bundle(tmp_path / str(number), version_id=f"{number}" * 64), tmp_path / "repository")
    assert lint(tmp_path / "repository", SAFE) == []


def test_what_is_no_folder_or_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name a model repository"):
        lint(tmp_path / "nowhere", SAFE)
    with pytest.raises(InputError, match="is not a server version"):
        lint(tmp_path, "newest")
    assert lint(tmp_path, SAFE) == []


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_whatever_is_written_lint_only_finds(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    texts = [case.config for case in CASES.values() if case.config and "\udcff" not in case.config]
    text = data.draw(st.sampled_from(texts))
    cut = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(cut, len(text)))
    text = (
        text[:cut] + data.draw(st.sampled_from(["", "{", "}", '"', ": 3", "x: ", " [ ", "\n", "\0", text])) + text[end:]
    )
    folder = tmp_path_factory.mktemp("fuzz")
    Case("", text).write(folder / "model")
    found = lint(folder, data.draw(st.sampled_from([OLD, "2.70.0", SAFE])))
    assert all(isinstance(finding, Finding) for finding in found)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server into whose repository the cases are put, and loaded."""
    folder = tmp_path_factory.mktemp("linted")
    deploy(make_bundle(folder / "bundle"), folder / "models")
    with TritonServer(folder / "models", control=True, log=folder / "log") as running:
        Case("", BASE).write(folder / "models" / "ok")
        with Client(running.http_url, access=running.access) as client:
            client.load("ok")
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused is not None])
def test_triton_2_51_refuses_what_is_an_error_and_loads_what_is_a_warning(server: TritonServer, name: str) -> None:
    case = CASES[name]
    folder = server._repository / name
    case.write(folder) if case.config != "\udcff" else _bytes(folder)
    with Client(server.http_url, access=server.access) as client:
        said = ""
        try:
            client.load(name)
            client.unload(name)  # a Python model holds shared memory
        except GpuopsError as error:
            said = str(error)
    assert bool(said) == case.refused, said
    if said:
        assert re.search("refused|failed to load", said)  # rather than a server that is away
        assert RULES[case.code][0] == ERROR or case.code in ("GT110", "GT604")  # what another server may have
