"""A run moved to another number of ranks: every sample once an epoch, and the batches of an uninterrupted run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

RECORDS, BATCH = 75, 12

# A user's own script: own LightningModule, own Trainer, and only the data module is ours.
SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import lightning.pytorch as pl
import torch
from gpuops.data.datamodule import ZarrDataModule
from gpuops.data.order import Lanes
from gpuops.data.sample import Field
from gpuops.data.sampling import Weighted

work = json.loads(sys.argv[1])

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(6, 1)
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append([self.current_epoch, index, batch["id"].tolist()])
        return (self.net(batch["inputs"]["x"].flatten(1)) ** 2).mean()

    def configure_optimizers(self):
        if work["scheduled"]:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), 0.01)

world = int(os.environ.get("WORLD_SIZE", "1"))
options = {"sampled": {"sampling": Weighted("weight")}, "lanes": {"lanes": Lanes(6, 1, 2)}, "plain": {}}[work["order"]]
data = ZarrDataModule(work["url"], {"x": [Field("x")]}, {}, global_batch=work["batch"], threads=1, **options)
saving = pl.callbacks.ModelCheckpoint(work["folder"], filename="{step}", every_n_train_steps=1, save_top_k=-1)
trainer = pl.Trainer(
    accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", max_epochs=2, max_steps=work["steps"],
    logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[saving],
    use_distributed_sampler=work["distributed_sampler"], num_sanity_val_steps=0,
)
model = Model()
assert work["checkpoint"] is None or os.path.exists(work["checkpoint"])
trainer.fit(model, datamodule=data, ckpt_path=work["checkpoint"], weights_only=False)
weights = [p.tolist() for p in model.net.parameters()]
with open(os.path.join(work["folder"], f"seen-{trainer.global_rank}.json"), "w") as file:
    json.dump({"seen": model.seen, "weights": weights}, file)
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resumed") / "store"
    generator = np.random.default_rng(0)
    root = zarr.open_group(path, mode="w")
    values = generator.normal(size=(RECORDS, 2, 3)).astype(np.float32)
    root.create_array("x", data=values, chunks=(1, 2, 3), dimension_names=["time", "y", "x"])
    root.create_array("weight", data=(np.arange(RECORDS) % 3 + 1).astype(np.float32), dimension_names=["time"])
    (path.parent / "train.py").write_text(SCRIPT)
    return path


def train(url: Path, folder: Path, ranks: int, **work: Any) -> tuple[list[Any], list[Any]]:
    """Run the script on some ranks: the global batches [epoch, index, ids], and the trained weights."""
    folder.mkdir()
    options = {"scheduled": False, "steps": -1, "checkpoint": None, "order": "plain", "distributed_sampler": True}
    argument = json.dumps({"url": str(url), "folder": str(folder), "batch": BATCH, **options, **work})
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    paths = [entry for entry in sys.path if entry]
    done = subprocess.run(
        [sys.executable, *launch, str(url.parent / "train.py"), argument],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(ranks)]
    batches = []
    for parts in zip(*(one["seen"] for one in told), strict=True):
        assert len({(epoch, index, len(ids)) for epoch, index, ids in parts}) == 1, "ranks differ in their batches"
        ids = np.stack([ids for _, _, ids in parts], axis=1).ravel().tolist()
        batches.append([*parts[0][:2], ids])
    return batches, told[0]["weights"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "scheduled", "chain"),
    [
        ("plain", False, [(1, 4), (2, 9), (3, None)]),
        ("plain", True, [(1, 4), (3, 8), (2, None)]),
        ("lanes", False, [(3, 2), (2, 7), (1, None)]),
        ("sampled", True, [(2, 5), (3, None)]),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(
    url: Path, tmp_path: Path, order: str, scheduled: bool, chain: list[tuple[int, int | None]]
) -> None:
    alone, weights = train(url, tmp_path / "alone", 1, order=order)
    assert [batch[:2] for batch in alone] == [[epoch, index] for epoch in range(2) for index in range(6)]
    batches: list[Any] = []
    checkpoint = None
    for ranks, until in chain:
        folder = tmp_path / f"to-{until}"
        more, moved = train(
            url, folder, ranks, order=order, scheduled=scheduled, steps=until or -1, checkpoint=checkpoint
        )
        batches += more
        checkpoint = str(folder / f"step={until}.ckpt")
    assert batches == alone, "the same batches in the same order, whatever the ranks were"
    for epoch in range(2):
        samples = [sample for of, _, ids in batches if of == epoch for sample in ids]
        if order != "sampled":
            assert len(samples) == len(set(samples)) == RECORDS // BATCH * BATCH, "a sample was lost or came twice"
    for one, other in zip(weights, moved, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
