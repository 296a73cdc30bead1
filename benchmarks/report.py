"""Renders docs/performance.md and its pictures from the JSON in benchmarks/results/.

`make bench-report`. Nothing is typed by hand: a figure that stands in the page was measured, and
losses stand beside wins.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
README = ROOT / "README.md"
BEGIN, END = "<!-- projection -->", "<!-- /projection -->"

COMPOSED = ("protocol", "perturb", "contour")
"""Beginnings of what is no single pass over memory: a picture of its traffic would say nothing."""

# 70 epochs of 2,002 batches of 128: 20 % of ImageNet's 1,281,167 training images.
PAPER_IMAGES = 70 * 2002 * 128

HEAD = """# Performance

Rendered from the JSON under `benchmarks/results/` by `make bench-report`; measured by `make bench`.

How to read it. Every result was checked against the specification before it was timed. All
competitors of a row ran in one process with the same threads, in turn (A B C A B C ...), with an
allocator that keeps freed memory. A turn begins with 20 ms of untimed calls, and every thread that
a competitor keeps busy has a CPU of its own, for all of them alike. Times are medians, with the
10th and 90th percentile; a rival more than twenty times slower than we are is timed for a quarter
of the race at most. *Ratio* is the best exact peer's time over ours: above 1 we win, **below 1 we
lose**. *Copy* is our compulsory traffic (every input read once, every output written once) as a
share of a large copy measured in the same process; above 100 % the data stayed in cache. Peers
marked † do not compute the same thing and are not ranked.

What forbids more, and what was tried: [limits.md](limits.md).
"""


def load() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def milliseconds(row: dict[str, Any]) -> str:
    def short(value: float) -> str:
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"

    spread = f"{short(row['p10_ms'])} to {short(row['p90_ms'])}"
    return f"{short(row['median_ms'])} ({spread})"


def table(races: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| case | ours, ms | peers, ms | ratio | GB/s | copy | images/s | error |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for race in races:
        rows = race["competitors"]
        peers = sorted((n for n in rows if n != "ours"), key=lambda n: rows[n]["median_ms"])
        listed = "<br>".join(
            f"{name}{'†' if rows[name]['inexact'] else ''} {milliseconds(rows[name])}"
            for name in peers
        )
        ratio = race["ratio"]
        shown = "" if ratio is None else f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"
        lines.append(
            f"| {race['case']} | {milliseconds(rows['ours'])} | {listed} | {shown} "
            f"| {race['gigabytes_per_second']:.1f} | {race['copy_share']:.0%} "
            f"| {race['images_per_second']:,.0f} | {rows['ours']['error']:.1e} |"
        )
    return lines


def notes(races: list[dict[str, Any]]) -> list[str]:
    reasons = {
        f"{name}: {row['inexact']}"
        for race in races
        for name, row in race["competitors"].items()
        if row["inexact"]
    }
    return ["", *(f"† {reason}." for reason in sorted(reasons))] if reasons else []


def losses(races: list[dict[str, Any]]) -> list[str]:
    lost = [race for race in races if race["ratio"] is not None and race["ratio"] < 1]
    if not lost:
        return ["No race of this run was lost."]
    return [
        "Lost races:",
        "",
        *(
            f"* {race['op']}, {race['case']}: {race['best_peer']} x{race['ratio']:.2f} our time"
            for race in sorted(lost, key=lambda race: race["ratio"])
        ),
    ]


def family(race: dict[str, Any]) -> str:
    """The op that a race is about: 'blend, forward and mask gradient' -> 'blend'."""
    return race["op"].split(",")[0].split(" ")[0]


def with_gradient(race: dict[str, Any]) -> bool:
    return race["op"] != family(race)


def training_table(steps: list[dict[str, Any]]) -> list[str]:
    """A row for each competitor of each case; `ratio` is the authors' time over its own."""
    lines = [
        "| network, images | strategy | | ms a step | images/s | ratio | peak memory, MiB |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for step in steps:
        rows = step["competitors"]
        for name, row in sorted(rows.items(), key=lambda item: item[1]["median_ms"]):
            ratio = rows["authors"]["median_ms"] / row["median_ms"]
            shown = f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"
            peak = row["peak_mebibytes"]
            lines.append(
                f"| {step['case']} | {step['strategy']} | {name} | {milliseconds(row)} "
                f"| {row['images_per_second']:,.1f} | {'' if name == 'authors' else shown} "
                f"| {'' if peak is None else f'{peak:,.0f}'} |"
            )
    return lines


def phase_table(steps: list[dict[str, Any]]) -> list[str]:
    """Where our step's time goes."""
    phases = [*sorted({phase for step in steps for phase in step["phases"]} - {"rest"}), "rest"]
    lines = [
        "| network, images | strategy | " + " | ".join(phases) + " |",
        "|---|---|" + "---:|" * len(phases),
    ]
    for step in steps:
        cells = (f"{step['phases'].get(phase, 0):.0%}" for phase in phases)
        lines.append(f"| {step['case']} | {step['strategy']} | " + " | ".join(cells) + " |")
    return lines


def extraction_table(cases: list[dict[str, Any]]) -> list[str]:
    """Images per second end to end, and what they are worth beside the others'."""
    names = list(cases[0]["images_per_second"])
    lines = [
        "| case | " + " | ".join(f"{name}, images/s" for name in names) + " | ratios | limit | "
        "of its speed | host work, of the network's time | authors' host work over ours |",
        "|---|" + "---:|" * (len(names) + 1) + "---|---:|---:|---:|",
    ]
    for case in cases:
        speeds = [f"{case['images_per_second'][name]:,.1f}" for name in names]
        ratios = [case[f"times_{re.sub('[, ]+', '_', name)}"] for name in names[1:]]
        shown = ", ".join(f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**" for ratio in ratios)
        lines.append(
            f"| {case['case']} | {' | '.join(speeds)} | {shown} | {case['limiting_stage']} "
            f"| {case['share_of_slower_stage']:.0%} | {case['host_share_of_network']:.2%} "
            f"| {case['host_times_less_than_authors']:.1f} |"
        )
    return lines


def stage_table(cases: list[dict[str, Any]]) -> list[str]:
    """Milliseconds per image of every stage alone."""
    lines = [
        "| stage, ms an image | " + " | ".join(case["case"] for case in cases) + " |",
        "|---|" + "---:|" * len(cases),
    ]
    for stage in cases[0]["milliseconds_per_image"]:
        cells = (f"{case['milliseconds_per_image'][stage]:.3g}" for case in cases)
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return lines


def projection(steps: list[dict[str, Any]], device: str) -> str:
    """How long the paper's run would take here, from the steps that are the paper's but for the
    size of the batch; empty without one.
    """
    paper = [s for s in steps if s["training"] == "resnet50" and s["strategy"].startswith("FL")]
    if not paper:
        return ""
    rows = paper[0]["competitors"]
    best = max((name for name in rows if name != "authors"), key=lambda n: speed(rows, n))

    def days(name: str) -> str:
        return f"{PAPER_IMAGES / speed(rows, name) / 86400:.3g} days"

    fastest = "" if best == "ours" else f", {days(best)} as fast as it goes ({best})"
    return (
        f"Projected, not run: the paper's CASM (L100, ResNet-50, 70 epochs of 20 % of ImageNet, "
        f"{PAPER_IMAGES / 1e6:.1f} million images) would take {days('ours, eq. 8')} on {device}, "
        f"{days('ours')} with classifier_update='alternating'{fastest}, and {days('authors')} in "
        f"the authors' loop; from measured training steps, data loading and validation left out."
    )


def speed(rows: dict[str, Any], name: str) -> float:
    return float(rows[name]["images_per_second"])


def write_projection(sentence: str) -> None:
    """Puts the newest projection between its marks in the README."""
    text = README.read_text()
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (mark and end):
        raise SystemExit(f"expected {BEGIN} ... {END} in README.md")
    README.write_text(f"{before}{BEGIN}\n{sentence}\n{END}{after}")


TRAINING = """How to read it. *authors* is one iteration of the CASM authors' published loop, with
three fixes that today's PyTorch asks for (named in `benchmarks/bench_train.py`). *ours* takes the
same steps (`classifier_update="alternating"`; the weights of both are compared before anything is
timed). *ours, eq. 8* is the default scheme, the paper's joint step: where a snapshot judges it does
more than the authors' loop, 8 passes' worth against 6. By the arithmetic alone *ours* needs 3 where
the authors need 4 (F), 7 against 8 (L) and 12 against 14 (the others). FL, L100 and L1000 are
judged by a snapshot in half of their steps and cost the same. *Ratio* is the authors' time over the
competitor's. Peak memory is what the steps add to the process (its resident set) or to the GPU."""


EXTRACTION = """JPEG files of 500 x 375 to Parquet: ours, a pipeline that an engineer writes with
the usual libraries (DataLoader, torchvision, OpenCV, ElementTree), and the CASM authors' scoring.
The same files, network and threads, a core for the reader. Each runs as its user runs it: the
program `casm-fast` keeps freed memory, a script has glibc's defaults; *memory kept* gives it to the
engineer as well. *Ratios* are the time of the others over ours, in the order of the columns; a
network *as it stands* is the engineer's, without folded batch norms and in contiguous memory.
Host work is everything but decoding, resizing and the network."""


def picture(races: list[dict[str, Any]], path: Path, device: str, copy: float) -> None:
    """Each op's cases: time against compulsory bytes, with the line of the measured copy."""
    names = list(dict.fromkeys(family(race) for race in races))
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    for index, name in enumerate(names):
        for gradient, marker in ((False, "o"), (True, "^")):
            members = [r for r in races if family(r) == name and with_gradient(r) == gradient]
            axes.scatter(
                [race["bytes"] / 1e6 for race in members],
                [race["gigabytes_per_second"] for race in members],
                label=f"{name}, with gradient" if gradient else name,
                color=f"C{index}",
                marker=marker,
                s=30,
                alpha=0.85,
                zorder=3,
            )
    axes.axhline(copy, color="black", linewidth=1)
    axes.annotate(
        f"copy, {copy:.0f} GB/s",
        (0.01, copy),
        xycoords=("axes fraction", "data"),
        va="bottom",
        fontsize=9,
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="compulsory traffic of a call, MB",
        ylabel="achieved, GB/s",
        title=f"Traffic against the machine's copy: {device}",
    )
    axes.grid(True, which="major", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    kept = [(h, name) for h, name in zip(handles, labels, strict=True) if len(h.get_offsets())]
    figure.legend(*zip(*kept, strict=True), frameon=False, fontsize=9, loc="outside right center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    page = [HEAD]
    runs = load()
    if not runs:
        raise SystemExit("benchmarks/results/ holds no JSON: run `make bench` first")
    projections = []
    for run, source in zip(runs, sorted(RESULTS.glob("*.json")), strict=True):
        machine = run["machine_info"]["casm_fast"]
        races = [b["extra_info"] for b in run["benchmarks"] if "op" in b["extra_info"]]
        copy = races[0]["copy_gigabytes_per_second"]
        device = f"{machine['device']}, {machine['threads']} threads"
        image = IMAGES / f"roofline-{source.stem}.png"
        ops = [race for race in races if not race["op"].startswith(COMPOSED)]
        if ops:
            picture(ops, image, device, copy)
        page += [
            f"## {device}",
            "",
            f"casm_fast {machine['version']} at {run['commit_info']['id'][:10]}, torch "
            f"{machine['torch']}, {machine['instruction_set']} kernels; copy {copy:.1f} GB/s; "
            f"{run['datetime'][:10]}.",
            "",
            *(
                [f"![Achieved traffic against copy bandwidth](images/{image.name})", ""]
                if ops
                else []
            ),
            *losses(races),
            "",
        ]
        for op in dict.fromkeys(race["op"] for race in races):
            members = [race for race in races if race["op"] == op]
            page += [f"### {op}", "", *table(members), *notes(members), ""]
        steps = [b["extra_info"] for b in run["benchmarks"] if "training" in b["extra_info"]]
        if steps:
            page += ["### training step", "", TRAINING, "", *training_table(steps), ""]
            page += ["Where the time of *ours* goes:", "", *phase_table(steps), ""]
            sentence = projection(steps, device)
            page += [sentence, ""] if sentence else []
            projections += [(run["datetime"], sentence)] if sentence else []
        cases = [b["extra_info"] for b in run["benchmarks"] if "extraction" in b["extra_info"]]
        if cases:
            page += ["### extraction", "", EXTRACTION, "", *extraction_table(cases), ""]
            page += ["Every stage alone:", "", *stage_table(cases), ""]
    if projections:
        write_projection(max(projections)[1])
    PAGE.write_text("\n".join(page))
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
