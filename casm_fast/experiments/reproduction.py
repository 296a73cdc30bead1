"""`reproduce`: run an experiment by name and write down what it found."""

from __future__ import annotations

import difflib
import platform
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import casm_fast
from casm_fast.experiments import (
    animal_parts,
    architectures,
    claims,
    coco_examples,
    comparison_grid,
    conditions,
    distributions,
    failures,
    figure2,
    figure3,
    layers,
    occlusion_variants,
    pointing_game,
    preservation_vs_deletion,
    resizing,
    seeds,
    statistics,
    supplement_table1,
    table1,
    table2,
    table3,
    top5_setting,
)
from casm_fast.experiments.findings import Findings
from casm_fast.experiments.study import FULL, QUICK, Experiment, Scale, Study, write_json
from casm_fast.models.placement import choose_device
from casm_fast.report import charts
from casm_fast.report.page import commit
from casm_fast.report.rendering import write
from casm_fast.training.distributed import leads

PAGE = "index.html"

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        *(table1, table2, table3, seeds, statistics, figure2, figure3, resizing),
        *(claims, conditions),
        *(distributions, comparison_grid, top5_setting, architectures, layers),
        *(preservation_vs_deletion, coco_examples, failures, animal_parts),
        *(supplement_table1, pointing_game, occlusion_variants),
    )
}
"""Every experiment by name: those of CASM's paper in its order, then those of the supplement."""


@dataclass(frozen=True)
class Reproduction:
    """An experiment that was run. ``str(reproduction)`` is what a terminal shows.

    Attributes:
        name: Of the experiment.
        folder: results.json, one CSV file per table, one PNG file per figure, and the page.
        page: index.html.
        notice: What stands between these numbers and the paper's; empty if nothing does.
        findings: Tables, charts and pictures.
    """

    name: str
    folder: Path
    page: Path
    notice: str
    findings: Findings

    def __str__(self) -> str:
        parts = [str(table) for table in self.findings.tables]
        if self.notice:
            parts.insert(0, f"NOTE  {self.notice}")
        return "\n\n".join([*parts, self.findings.verdict])


def reproduce(
    name: str,
    *,
    data: str = "synthetic",
    quick: bool = False,
    output: str | Path | None = None,
    seeds: int | None = None,
    device: str = "auto",
    workers: int = 4,
    scale: Scale | None = None,
    **settings: Any,
) -> Reproduction:
    """Reproduce a table or figure of the CASM paper, or of meaningful perturbation.

    On ImageNet with the paper's settings; on the embedded set with its preset, where directions
    can be compared and numbers cannot. A call that was stopped goes on where it stopped, and
    experiments in the same `output` share their trainings.

    Args:
        name: One of `EXPERIMENTS`.
        data: Data set: "synthetic" (embedded), "imagenet:DIR", or a folder with train and val.
        quick: Fewer images and epochs: minutes on two cores with the embedded set.
        output: Folder of the results; by default reproduce/<data>-<scale>.
        seeds: Number of repeated runs, for experiments that have any; else the paper's.
        device: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1" ...
        workers: Threads that decode images.
        scale: Another size than `quick` or the full one.
        **settings: Fields of `TrainConfig` for every training.

    Returns:
        What was found, and where it lies.

    Raises:
        ValueError: There is no such experiment, or the folder was made with other settings.
        FileNotFoundError: The data set is not there.
    """
    experiment = find(name)
    scale = scale or (QUICK if quick else FULL)
    if output is None:
        kind = data.partition(":")[0] if ":" in data or data == "synthetic" else Path(data).name
        output = Path("reproduce") / f"{kind}-{scale.name}"
    study = Study(
        experiment.name,
        Path(output),
        data=data,
        scale=scale,
        embedded=",".join(
            filter(None, (experiment.embedded, experiment.quick if scale is QUICK else ""))
        ),
        seeds=seeds,
        device=device,
        workers=workers,
        settings=settings,
    )
    if study.notice:
        study.progress(study.notice)
    _check_data(study, experiment)
    started = time.perf_counter()
    findings = experiment.run(study)
    if leads():
        _write(study, experiment, findings, time.perf_counter() - started)
    page = study.folder / PAGE
    return Reproduction(name, study.folder, page, study.notice, findings)


def _check_data(study: Study, experiment: Experiment) -> None:
    """Refuse, before days of training, a data set that the experiment cannot use.

    Raises:
        ValueError: It has no validation images of its own, or no true boxes where they are needed.
    """
    images = study.validation
    if images.name == study.training.name:
        raise ValueError(
            f"reproduce: expected training and validation images, got {images.name} for both; "
            "give imagenet:DIR, or a folder that holds train and val"
        )
    if experiment.needs_boxes and not images.has_boxes:
        raise ValueError(
            f"reproduce: expected true boxes for {experiment.name}, got none with {images.name}; "
            "for ImageNet, put its XML annotations beside the images"
        )


def find(name: str) -> Experiment:
    """The experiment of this name.

    Raises:
        ValueError: There is none; the message names the closest.
    """
    if name not in EXPERIMENTS:
        close = difflib.get_close_matches(name, EXPERIMENTS, n=3, cutoff=0.5)
        known = f"did you mean {' or '.join(close)}?" if close else ", ".join(EXPERIMENTS)
        raise ValueError(f"reproduce: expected the name of an experiment, got {name!r}: {known}")
    return EXPERIMENTS[name]


def listing() -> str:
    """Every experiment with its summary, for a terminal."""
    width = max(map(len, EXPERIMENTS))
    return "\n".join(f"  {name:<{width}}  {e.summary}" for name, e in EXPERIMENTS.items())


def _write(study: Study, experiment: Experiment, findings: Findings, seconds: float) -> None:
    """results.json, CSV files, PNG files and the page."""
    device = choose_device(study.device)
    provenance = {
        "experiment": f"{experiment.name}: {experiment.summary}",
        "paper": experiment.paper,
        "data": study.validation.name,
        "images": f"{len(study.training):,} to learn from, {study.limit:,} scored",
        "scale": study.scale.name,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)",
        "versions": f"casm_fast {casm_fast.__version__}, torch {torch.__version__}, "
        f"python {platform.python_version()}",
        "commit": commit() or "",
        "this call": f"{seconds:.0f} s (finished parts are not done again)",
    }
    write_json(
        study.folder / "results.json",
        {
            "name": experiment.name,
            "verdict": findings.verdict,
            "notice": study.notice,
            "tables": [table.to_dict() for table in findings.tables],
            "notes": list(findings.notes),
            "provenance": provenance,
        },
    )
    for table in findings.tables:
        table.write_csv(study.folder / f"{table.name}.csv")
    for gallery in findings.galleries:
        gallery.draw(study.folder / f"{gallery.name}.png")
    for chart in findings.charts:
        charts.picture(chart.draw, study.folder / f"{chart.name}.png", chart.size)
    today = f"{datetime.now():%d %B %Y}".lstrip("0")
    write(
        "experiments/page.html.jinja",
        {
            "title": f"casm-fast reproduce {experiment.name}",
            "eyebrow": f"casm-fast reproduce {experiment.name}, {today}",
            "verdict": findings.verdict,
            "lead": f"{experiment.summary[0].upper()}{experiment.summary[1:]}. {experiment.paper}.",
            "notice": f"{study.notice[0].upper()}{study.notice[1:]}." if study.notice else "",
            "tables": findings.tables,
            "charts": [
                {
                    "title": chart.title,
                    "caption": chart.caption,
                    "svg": charts.themed_svg(chart.draw, chart.size),
                    "wide": chart.size[0] > 6,
                }
                for chart in findings.charts
            ],
            "galleries": [
                {"title": g.title, "caption": g.caption, "groups": g.strips()}
                for g in findings.galleries
            ],
            "size": 1,
            "notes": findings.notes,
            "provenance": [(k.capitalize(), text) for k, text in provenance.items() if text],
            "version": casm_fast.__version__,
            "footer": "Written by casm-fast. Everything on this page is inside this file.",
        },
        study.folder / PAGE,
    )
