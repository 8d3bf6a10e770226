"""Augmentation and curves from the data module to the served graph: alike on any rank, the middle in evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_room import SCALE, Atlas, data_module
from jsonargparse import ArgumentParser

from gpuops.data.datamodule import Augment, ZarrDataModule
from gpuops.data.loader import ZarrLoader
from gpuops.data.patches import Patch
from gpuops.data.sample import Field, SampleSpec
from gpuops.data.source import Source
from gpuops.errors import InputError
from gpuops.preprocess.geometry import CenterCrop, table
from gpuops.preprocess.steps import Asinh, Log, Normalize

AUGMENT = Augment(crop=(6, 6), flip=("x", "y"), turn=True)
FIELDS: dict[str, Any] = {
    "inputs": {"x": [Field("turbidity")], "height": [Field("altitude")]},
    "targets": {"y": [Field("turbidity", name="same", raw=True)]},
    "window": None,
}


def test_inputs_and_targets_are_moved_alike_and_validation_is_not(store: Source, atlas: Atlas) -> None:
    with data_module(store, augment=AUGMENT, global_batch=4, **FIELDS) as module:
        batch = next(iter(module.train_dataloader()))
        assert batch["inputs"]["x"].shape == batch["targets"]["y"].shape == (4, 12, 6, 6)
        assert batch["inputs"]["height"].shape == (4, 1, 6, 6)
        rows = table(AUGMENT.steps(), batch["id"].numpy(), module.seed, 0, (10, 10))
        for place, (_, y, x, flip, rot) in enumerate(rows.tolist()):
            stored = torch.from_numpy(atlas.tiles[batch["id"][place]])[:, y : y + 6, x : x + 6]
            want = torch.rot90(stored.flip([axis for axis in (1, 2) if flip >> (2 - axis) & 1]), rot, (1, 2))
            assert torch.equal(batch["targets"]["y"][place], want)
            back = unnormalized(module, batch["inputs"]["x"])[place]
            torch.testing.assert_close(back, want.double() * SCALE, rtol=0, atol=1e-5)
        held = next(iter(module.val_dataloader()))
        middle = atlas.tiles[held["id"].numpy()][:, :, 2:8, 2:8]
        assert torch.equal(held["targets"]["y"], torch.from_numpy(middle))


def unnormalized(module: ZarrDataModule, values: torch.Tensor) -> torch.Tensor:
    steps = module.preprocess["inputs"].tensors["x"][0].steps
    normalize = next(step for step in steps if isinstance(step, Normalize))
    mean, std = (torch.tensor(v).double().view(1, -1, 1, 1) for v in (normalize.mean, normalize.std))
    return values.double() * std + mean


def test_a_sample_is_augmented_alike_on_any_number_of_ranks_and_anew_every_epoch(store: Source) -> None:
    def epoch(number: int, ranks: int) -> dict[int, torch.Tensor]:
        seen = {}
        for rank in range(ranks):
            with data_module(store, augment=AUGMENT, global_batch=4, **FIELDS) as module:
                loader = module.train_dataloader()
                alone = ZarrLoader(
                    loader.reader,
                    module.train_ids,
                    loader._order,
                    rank=rank,
                    ranks=ranks,
                    epoch=lambda: number,
                    inputs=loader._inputs,
                    targets=loader._targets,
                    device=torch.device("cpu"),
                    seed=module.seed,
                )
                for batch in alone:
                    seen |= dict(zip(batch["id"].tolist(), batch["targets"]["y"], strict=True))
        return seen

    one, two, later = epoch(0, 1), epoch(0, 2), epoch(1, 1)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[sample], two[sample]) for sample in one)
    assert any(not torch.equal(one[sample], later[sample]) for sample in one.keys() & later.keys())


def test_run_yaml_declares_it() -> None:
    parser = ArgumentParser()
    parser.add_argument("--augment", type=Augment | None)
    parsed = parser.parse_string("augment: {crop: [6, 6], flip: [x, y], turn: true}")
    assert parser.instantiate(parsed).augment == AUGMENT


def test_a_crop_that_cannot_be_had_is_refused(store: Source) -> None:
    with (
        pytest.raises(InputError, match=r"a crop of \(11, 6\) does not fit in samples of \(10, 10\)"),
        data_module(store, augment=Augment(crop=(11, 6)), **FIELDS),
    ):
        pass
    halo = FIELDS | {"patch": Patch({"y": 4, "x": 4}, {"y": 1, "x": 1})}
    with (
        pytest.raises(InputError, match=r"of \(4, 4\) and \(6, 6\) cannot be cropped alike"),
        data_module(store, augment=Augment(crop=(2, 2)), **halo),
    ):
        pass


@pytest.mark.parametrize(("function", "curve"), [("log", np.log1p), ("asinh", np.arcsinh)])
def test_a_function_s_values_are_normalised_by_their_own_statistics(store: Source, function: Any, curve: Any) -> None:
    fields = {"x": [Field("turbidity", function=function, scale=0.5)]}
    with data_module(store, inputs=fields, targets=fields_of(function), window=None, global_batch=1) as module:
        batches = list(module.train_dataloader())
        x = torch.cat([batch["inputs"]["x"] for batch in batches]).double()
        torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(12).double(), atol=1e-5, rtol=0)
        torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(12).double(), atol=1e-5, rtol=0)
        steps = module.preprocess["inputs"].tensors["x"][0].steps
        assert (Log(0.5) if function == "log" else Asinh(0.5)) in steps
        physical = module.physical("y", batches[0]["targets"]["y"]).double()
        torch.testing.assert_close(physical, unnormalized_curve(batches[0], module, curve), rtol=1e-5, atol=1e-5)


def fields_of(function: Any) -> dict[str, list[Field]]:
    return {"y": [Field("turbidity", name="same", function=function, scale=0.5)]}


def unnormalized_curve(batch: dict[str, Any], module: ZarrDataModule, curve: Any) -> torch.Tensor:
    values = unnormalized(module, batch["inputs"]["x"])
    return (torch.expm1(values) if curve is np.log1p else torch.sinh(values)) * 0.5


def test_a_logarithm_of_what_has_none_is_refused(store: Source) -> None:
    fields = {"x": [Field("altitude", function="log", scale=1.0)]}  # the lowest is -450 m
    with (
        pytest.raises(InputError, match=r"holds values of -394.*give the field a `clip`, or take asinh"),
        data_module(store, inputs=fields, targets={}, window=None),
    ):
        pass
    with (
        pytest.raises(InputError, match="give a positive number"),
        data_module(store, inputs={"x": [Field("turbidity", function="asinh", scale=0.0)]}, targets={}, window=None),
    ):
        pass
    with pytest.raises(InputError, match="function 'sqrt' is not log or asinh"):
        SampleSpec({"x": [Field("turbidity", function="sqrt")]}, {})  # type: ignore[arg-type]


def test_what_is_not_declared_leaves_identities_as_they_were(store: Source, tmp_path: Path) -> None:
    plain = SampleSpec({"x": [Field("turbidity")]}, {})
    assert "function" not in str(plain.to_json())
    curved = SampleSpec({"x": [Field("turbidity", function="asinh", scale=2.0)]}, {})
    assert SampleSpec.from_json(curved.to_json()) == curved
    with data_module(store, **FIELDS) as one, data_module(store, augment=AUGMENT, **FIELDS) as two:
        assert one.fingerprint == two.fingerprint, "the order does not depend on what is done to its samples"
        assert two.preprocess["inputs"].eval().geometry == (CenterCrop((6, 6)),)
