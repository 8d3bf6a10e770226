"""The page itself: plain HTML with everything inside, readable without a network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gpuops.bundle import Bundle, read_bundle
from gpuops.energy.derived import derive
from gpuops.errors import InputError
from gpuops.lineage.version import RUN_FILE
from gpuops.report.figures import held_out_map, latency_bars, loss_curve, power_curves, skill_bars, step_shares

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.lead { font-size: 1.1rem; } p.note, figcaption { color: #6b7280; }
figure { margin: 0; } img { max-width: 100%; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; vertical-align: top; }
th { font-weight: 500; color: #6b7280; } td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
code { font-size: .85em; }
"""


def write_report(
    run: Path,
    destination: Path,
    *,
    bundle: Path | None,
    served: Sequence[Mapping[str, Any]],
    carbon: float | None = None,
    price: float | None = None,
) -> None:
    """Write the page of a run.

    Args:
        run: run directory.
        destination: HTML file to write.
        bundle: the run's bundle, for maps and parity.
        served: reports of `gpuops infer --json`, for latency and served parity.
        carbon: grams of CO2 equivalent per kWh, the user's figure; shown as derived.
        price: price per kWh, the user's figure; shown as derived.

    Raises:
        InputError: no run there, or the bundle is another run's.
    """
    file = run / RUN_FILE
    if not file.is_file():
        raise InputError(f"{run} holds no {RUN_FILE}: give the run directory (trainer.default_root_dir) of a fit")
    record = json.loads(file.read_text())
    opened = None if bundle is None else read_bundle(bundle)
    if opened is not None and opened.manifest["run_id"] != record["run_id"]:
        raise InputError(f"{bundle} was exported from run {opened.manifest['run_id'][:12]}, not from {run}")
    sections = [
        _headline(record, opened),
        _section("Skill", _image(skill_bars(_metrics(record))), _skill_note(record)),
        _section("Forecast over a held-out region", *_map(record, opened)),
        _section("Training", _image(loss_curve(run)), _reading(record)),
        _section("Step time", _image(step_shares(run, record.get("step_times") or [])), _steps(record)),
        _section("Parity with the training pipeline", _parity(opened, served)),
        _section("Latency", _image(latency_bars(served)), _latency_note(served)),
        _section("Energy", _image(power_curves(run)), _energy(record, served), _derived(record, carbon, price)),
        _section("Identity", _identity(record, opened)),
    ]
    title = f"gpuops: {_model_name(record)}"
    page = (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style>{''.join(sections)}</html>\n"
    )
    destination.parent.mkdir(parents=True, exist_ok=True)
    destination.write_text(page)


def _headline(record: Mapping[str, Any], bundle: Bundle | None) -> str:
    metrics = _metrics(record)
    lead = ""
    if "val_rmse" in metrics:
        rivals = {k.removesuffix("_rmse"): v for k, v in metrics.items() if k.endswith("_rmse") and k != "val_rmse"}
        against = ", ".join(f"{name} {value:.3f}" for name, value in sorted(rivals.items(), key=lambda item: item[1]))
        lead = f"Held-out RMSE <b>{metrics['val_rmse']:.3f}</b>" + (f" against {escape(against)}." if against else ".")
    version = "not exported" if bundle is None else bundle.version_id
    return (
        f"<h1>{escape(_model_name(record))}</h1><p class='note'>version <code>{version}</code>, {record['status']} "
        f"{escape(str(record.get('finished', '')))}</p><p class='lead'>{lead}</p>"
    )


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """Metrics that are numbers; the others were not finite."""
    return {name: value for name, value in (record.get("metrics") or {}).items() if value is not None}


def _model_name(record: Mapping[str, Any]) -> str:
    return str(record["model"]["class_path"]).rpartition(".")[2]


def _skill_note(record: Mapping[str, Any]) -> str:
    metrics = _metrics(record)
    if "val_rmse" not in metrics:
        return ""
    skills = [
        f"{1 - metrics['val_rmse'] / value:.0%} below {name.removesuffix('_rmse')}"
        for name, value in metrics.items()
        if name.endswith("_rmse") and name != "val_rmse" and value > 0
    ]
    return (
        _note(f"The model's error is {', '.join(skills)}, on the same held-out samples in the same run.")
        if skills
        else ""
    )


def _map(record: Mapping[str, Any], bundle: Bundle | None) -> tuple[str, ...]:
    if bundle is None:
        return (_note("Give the bundle to see maps: gpuops report RUN --bundle BUNDLE."),)
    if record["sample"] is None or (found := held_out_map(record, bundle)) is None:
        return ()
    picture, caption = found
    return (_image(picture, caption),)


def _reading(record: Mapping[str, Any]) -> str:
    ranks = [rank for rank in record.get("reading") or [] if rank]
    if not ranks:
        return ""
    slowest = max(ranks, key=lambda rank: rank["stall_s"])

    def shown(key: str, form: str) -> str:
        value = slowest.get(key)
        return "unknown" if value is None else format(value, form)

    rows = {
        "ranks, epochs, samples": f"{record['world_size']}, {record['epochs']}, {record['samples_seen']:,}",
        "requests a sample": shown("requests_per_sample", ".3f"),
        "bytes read a useful byte": shown("bytes_per_useful_byte", ".4f"),
        "decodes a distinct chunk": shown("decodes_per_distinct_chunk", ".3f"),
        "waited for data": f"{slowest['stall_s']:.1f} s ({shown('stall_share', '.1%')}) on the slowest rank",
        "limited by": slowest.get("limiting_stage") or "unknown",
        "held at most": f"{slowest['held_bytes'] / 1e6:.0f} of {slowest['budget_bytes'] / 1e6:.0f} MB",
    }
    return _table(rows.items())


def _parity(bundle: Bundle | None, served: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    if bundle is not None:
        rows = [
            (
                f"{name}, fresh process",
                f"{p['max_abs_diff']:.2e} over batches 1 to {p['batches']}; refused {', '.join(p['refused'])}",
            )
            for name, p in bundle.manifest["parity"].items()
        ]
    rows += [
        (f"served, {str(report['server']).partition(':')[0]}", f"{report['max_abs_diff']:.2e} on golden samples")
        for report in served
        if "max_abs_diff" in report
    ]
    return _table(rows) + (_note("Largest absolute difference, in physical units.") if rows else "")


def _latency_note(served: Sequence[Mapping[str, Any]]) -> str:
    if not served:
        return _note("Not served yet.")
    first = served[0]
    return _note(f"tritonserver {first['server_version']}, {first['requests']} requests a protocol.")


def _energy(record: Mapping[str, Any], served: Sequence[Mapping[str, Any]]) -> str:
    rows = [("training", record.get("energy"), "joules")]
    rows += [(f"served, {str(r['server']).partition(':')[0]}", r.get("energy"), "joules_per_request") for r in served]
    shown = []
    for what, energy, key in rows:
        if energy is None:
            shown.append((what, "not metered"))
        elif energy[key] is None:
            shown.append((what, f"unknown: {energy['reason']}"))
        else:
            shown.append((what, f"{energy[key]:,.1f} J ({energy['method']}, {energy.get('tenancy', 'unknown')})"))
        if what == "training" and energy is not None and energy.get("joules_per_sample") is not None:
            shown.append(("training sample", f"{energy['joules_per_sample']:.4g} J, validation not counted"))
    return _table(shown)


def _steps(record: Mapping[str, Any]) -> str:
    rows = record.get("step_times") or []
    if not rows:
        return ""
    last = rows[-1]
    ours = [
        f"{name} {last[f'{name}_share']:.1%}" for name in ("stall", "copy", "preprocess") if f"{name}_share" in last
    ]
    worst = f"waiting for data on the worst rank {last['data_share_worst_rank']:.1%}"
    return _note(
        f"Rank 0, last epoch: {last['step_ms']:.1f} ms a step; {', '.join([*ours, worst])}. On a GPU copies run beside "
        "the computation, so that their share may hide behind it."
    )


def _derived(record: Mapping[str, Any], carbon: float | None, price: float | None) -> str:
    derived = derive((record.get("energy") or {}).get("joules"), carbon=carbon, price=price)
    if derived is None:
        return ""
    rows = [("energy, kWh", derived["kwh"]), ("carbon, g CO2e", derived.get("carbon_g")), ("cost", derived.get("cost"))]
    shown = [(f"derived: {name}", "unknown" if value is None else f"{value:.4g}") for name, value in rows]
    return _table(shown) + _note("From measured joules and figures that you gave; not measured.")


def _identity(record: Mapping[str, Any], bundle: Bundle | None) -> str:
    identity = record["identity"] if bundle is None else bundle.manifest["identity"]
    data, code, environment = identity["data"], identity["code"], identity["environment"]
    commit = code["commit"] or f"none ({code['reason']})"
    rows = {
        "version id": "-" if bundle is None else bundle.version_id,
        "run id": record["run_id"],
        "data": f"fingerprint {data['fingerprint']}, snapshot {data['snapshot']}",
        "code": f"commit {commit}, uncommitted changes {code['dirty'] or 'none'}",
        "model file": code["module"],
        "gpuops": code["gpuops"],
        "kernels": identity["kernels"],
        "weights": identity.get("weights", "-"),
        "environment": f"Python {environment['python']}, {len(environment['packages'])} packages",
    }
    config = escape(json.dumps(identity["config"], indent=1))
    return _table(rows.items()) + f"<details><summary>config</summary><pre>{config}</pre></details>"


def _section(title: str, *parts: str) -> str:
    body = "".join(parts)
    return f"<h2>{escape(title)}</h2>{body}" if body else ""


def _image(source: str | None, caption: str = "") -> str:
    if source is None:
        return ""
    return f"<figure><img alt='{escape(caption)}' src='{source}'><figcaption>{escape(caption)}</figcaption></figure>"


def _note(text: str) -> str:
    return f"<p class='note'>{escape(text)}</p>"


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = "".join(f"<tr><th>{escape(str(name))}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
    return f"<table>{lines}</table>" if lines else ""
