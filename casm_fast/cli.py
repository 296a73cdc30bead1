"""The command line: ``casm-fast VERB``; the verbs are those of `VERBS`.

The options of a verb are the fields of the dataclass that its Python function takes, so the two
cannot drift apart. Exit codes: 0 done; 1 the request cannot be met, and one sentence on the error
stream says why; 2 the command line is not understood; 70 a defect of casm_fast; 130 stopped by
Ctrl-C; 143 by SIGTERM. Where torchrun starts several processes for ``train``, one of them speaks.
"""

from __future__ import annotations

import abc
import ast
import contextlib
import importlib.util
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from casm_fast import doctor
from casm_fast.attribution import attribute_set
from casm_fast.attribution import listing as methods
from casm_fast.data.source import open_source
from casm_fast.data.synthetic import SyntheticSource, write_tree
from casm_fast.evaluation import evaluate
from casm_fast.experiments import reproduce
from casm_fast.experiments.reproduction import listing
from casm_fast.extraction import ExtractConfig, export, extract, predict
from casm_fast.extraction.exporting import Category, Format
from casm_fast.models import (
    Classifier,
    compile_program,
    export_onnx,
    export_program,
    load,
    open_classifier,
)
from casm_fast.perturbation import PerturbConfig, perturb_set
from casm_fast.perturbation.config import Preset
from casm_fast.report import browse, gallery, report
from casm_fast.report.browsing import LIMIT as BROWSED
from casm_fast.training import TrainConfig, train
from casm_fast.training.distributed import leads

HAS_TYRO = importlib.util.find_spec("tyro") is not None
if HAS_TYRO:  # only the verbs need it; main() says so where it is missing
    import tyro

# Its own name even where this module is __main__.
logger = logging.getLogger("casm_fast.cli")

OK, REFUSED, DEFECT, INTERRUPTED = 0, 1, 70, 130

NO_TYRO = (
    "casm-fast: expected tyro, which reads the command line, but it is not installed: "
    "pip install tyro (in Python, casm_fast.train, extract and evaluate work without it)"
)

DEMO_TREE = "synthetic-jpegs"
"""Folder of the demo's JPEG files."""

DEMO_IMAGES = 1000
"""Validation images of the demo."""

QUICK_IMAGES, QUICK_PRETRAIN_EPOCHS, QUICK_EPOCHS = 2000, 8, 3
"""Training of ``demo --quick``."""


@dataclass(frozen=True, kw_only=True)
class Verb(abc.ABC):
    """What every verb takes."""

    verbose: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show tracebacks and debug messages."""

    @abc.abstractmethod
    def run(self) -> None:
        """Do it."""


@dataclass(frozen=True, kw_only=True)
class Demo(Verb):
    """Train on the embedded set, find boxes in JPEG files, score them, write a report.

    Takes a few minutes on a CPU and downloads nothing. Interrupted, it goes on where it stopped.

    Example: casm-fast demo
    """

    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("demo")
    """Folder for everything that the demo makes."""

    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Half of the images and fewer epochs: sooner done, worse boxes."""

    seed: int = 0
    """Seed of the training."""

    device: str = "auto"
    """"auto" (a GPU when there is one), "cpu", "cuda", "cuda:1" ..."""

    def run(self) -> None:
        """Train, extract, evaluate, report."""
        started = time.perf_counter()
        folder = self.output
        say = logger.info

        say("[1/4] pictures: the validation images of the embedded set as JPEG files")
        tree = demo_tree(folder)

        say("[2/4] training: a compact classifier, then its saliency maps")
        config = TrainConfig(output=folder / "run", resume=True, seed=self.seed, device=self.device)
        if self.quick:
            config = replace(
                config,
                data=f"synthetic:images={QUICK_IMAGES}",
                output=folder / "run-quick",
                pretrain_epochs=QUICK_PRETRAIN_EPOCHS,
                epochs=QUICK_EPOCHS,
            )
        try:
            result = train(config)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "Everything is saved: the same command goes on where it stopped"
            ) from None

        say("[3/4] extraction: one box per file")
        extraction = extract(
            result.folder, f"imagenet-val:{tree}", folder / "boxes.parquet", device=self.device
        )
        say(str(extraction))

        say("[4/4] scores and report")
        scores = evaluate(extraction, json=folder / "scores.json")
        page = report(extraction, scores, folder / "report.html", run=result.folder)
        print(f"\n{scores}\n")
        print(f"report: {page} ({time.perf_counter() - started:.0f} s in all)")


@dataclass(frozen=True, kw_only=True)
class Train(Verb):
    """Train a classifier together with its saliency maps.

    Without options: on the embedded synthetic set, some minutes on a CPU. The run folder gets the
    model, the log, and what an exact resume needs.

    Example: casm-fast train --data imagenet:/data/ILSVRC --strategy L100 --output runs/l100
    """

    config: TrainConfig = field(default_factory=TrainConfig)

    def run(self) -> None:
        """Train."""
        result = train(self.config)
        if not leads():
            return
        for name, value in result.scores.items():
            print(f"{name.replace('_', ' '):<20}  {value:.4f}")
        print(f"{'model':<20}  {result.checkpoint}")
        print(f"{'log':<20}  {result.log}")
        print(f"next: casm-fast extract {result.folder} SOURCE --output boxes.parquet")


@dataclass(frozen=True, kw_only=True)
class Extract(Verb):
    """Find one box per image, and measure its saliency map.

    SOURCE is imagenet-val:DIR, imagenet:DIR, coco:DIR, voc:DIR, wsol:METADATA, folder:DIR, a path,
    or synthetic. The result is a Parquet file, or a folder of them, with one row per image.
    Interrupted, the same command goes on where it stopped.

    Example: casm-fast extract runs/l100 imagenet-val:/data/ILSVRC --output val.parquet
    """

    model: tyro.conf.Positional[Path]
    """Checkpoint, or the folder of a training run."""

    source: tyro.conf.Positional[str]
    """Images."""

    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("boxes.parquet")
    """One .parquet file, or a folder of them."""

    config: ExtractConfig = field(default_factory=ExtractConfig)

    def run(self) -> None:
        """Extract."""
        print(extract(self.model, self.source, self.output, self.config))
        print(f"next: casm-fast evaluate {self.output}")


@dataclass(frozen=True, kw_only=True)
class Predict(Verb):
    """Find the box of one photo, and draw it over its saliency.

    Example: casm-fast predict photo.jpg --model runs/l100
    """

    photo: tyro.conf.Positional[Path]
    """Picture file."""

    model: Path
    """Checkpoint, or the folder of a training run."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=("-o",))] = None
    """Picture to write (default: the photo's name with -saliency.png, in this folder)."""

    config: ExtractConfig = field(default_factory=ExtractConfig)

    def run(self) -> None:
        """Predict."""
        found = predict(self.model, self.photo, self.config)
        print(found)
        print(found.save(self.output or Path(f"{self.photo.stem}-saliency.png")))


@dataclass(frozen=True, kw_only=True)
class Export(Verb):
    """Write boxes in the format of another tool.

    Example: casm-fast export val.parquet --to coco
    """

    boxes: tyro.conf.Positional[Path]
    """Parquet file or folder of casm-fast extract."""

    to: Format = "coco"
    """Format."""

    category: Category = "predicted"
    """Category of a result: the class predicted, or the true label (localisation with known
    classes)."""

    pictures: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the pictures, too (voc, yolo, fiftyone)."""

    images: str | None = None
    """Folder or URL where the pictures will be found (label-studio, fiftyone)."""

    model: Path | None = None
    """Model whose maps are written (wsol-npy, overlays; default: the one that made the boxes)."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=("-o",))] = None
    """File or folder to write (default: after the boxes)."""

    def run(self) -> None:
        """Export."""
        for path in export(
            self.boxes,
            self.output,
            to=self.to,
            category=self.category,
            pictures=self.pictures,
            images=self.images,
            model=self.model,
        ):
            print(path)


@dataclass(frozen=True, kw_only=True)
class ExportModel(Verb):
    """Write a model for other programs: torch.export's .pt2, or .onnx.

    Example: casm-fast export-model runs/l100 model.onnx
    """

    model: tyro.conf.Positional[Path]
    """Checkpoint, or the folder of a training run."""

    output: tyro.conf.Positional[Path]
    """File to write; its suffix, .pt2 or .onnx, names the format."""

    boxes: tyro.conf.FlagCreatePairsOff[bool] = False
    """Boxes and areas beside saliency and logits (.pt2; then the reader imports casm_fast)."""

    compile: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compile the .pt2 by AOTInductor for this kind of device."""

    def run(self) -> None:
        """Export."""
        suffix = self.output.suffix
        if suffix not in (".pt2", ".onnx"):
            raise ValueError(f"output: expected a file .pt2 or .onnx, got {self.output}")
        if suffix == ".onnx" and (self.boxes or self.compile):
            raise ValueError(
                "output: expected .pt2 beside --boxes or --compile, which ONNX has not, "
                f"got {self.output}"
            )
        model = load(self.model)
        if suffix == ".onnx":
            print(export_onnx(model, self.output))
        elif self.compile:
            print(compile_program(model, self.output, boxes=self.boxes))
        else:
            print(export_program(model, self.output, boxes=self.boxes))


@dataclass(frozen=True, kw_only=True)
class Browse(Verb):
    """Write one self-contained HTML page of thumbnails with boxes: filter, sort, enlarge.

    Example: casm-fast browse val.parquet
    """

    boxes: tyro.conf.Positional[Path]
    """Parquet file or folder of casm-fast extract."""

    source: str | None = None
    """Images (default: those that the boxes were made from)."""

    limit: int = BROWSED
    """Images at most, taken at even distances."""

    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("browse.html")
    """HTML file to write."""

    def run(self) -> None:
        """Browse."""
        print(browse(self.boxes, self.output, self.source, limit=self.limit))


@dataclass(frozen=True, kw_only=True)
class Evaluate(Verb):
    """Score boxes against the true ones: LE, OM, F1, and boxes that look at nothing beside them.

    Example: casm-fast evaluate val.parquet --json scores.json
    """

    boxes: tyro.conf.Positional[Path]
    """Parquet file or folder of casm-fast extract."""

    json: Path | None = None
    """File to write the scores to, as JSON."""

    def run(self) -> None:
        """Evaluate."""
        print(evaluate(self.boxes, json=self.json))


@dataclass(frozen=True, kw_only=True)
class Report(Verb):
    """Write one self-contained HTML page with scores, curves and pictures.

    Example: casm-fast report val.parquet --run runs/l100 --output report.html
    """

    boxes: tyro.conf.Positional[Path]
    """Parquet file or folder of casm-fast extract."""

    run_folder: Annotated[Path | None, tyro.conf.arg(name="run")] = None
    """Folder of the training run, for its curves."""

    model: Path | None = None
    """Model for the pictures (default: the one that made the boxes)."""

    source: str | None = None
    """Images for the pictures (default: those that the boxes were made from)."""

    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("report.html")
    """HTML file to write."""

    gallery: Path | None = None
    """Also draw the gallery alone, into this picture file."""

    columns: int = 7
    """Pictures side by side."""

    def run(self) -> None:
        """Report."""
        page = report(
            self.boxes,
            evaluate(self.boxes),
            self.output,
            run=self.run_folder,
            model=self.model,
            source=self.source,
            columns=self.columns,
        )
        print(f"report: {page}")
        if self.gallery is not None:
            drawn = gallery(
                self.boxes,
                self.gallery,
                model=self.model,
                source=self.source,
                columns=self.columns,
            )
            print(f"gallery: {drawn}")


@dataclass(frozen=True, kw_only=True)
class Reproduce(Verb):
    """Make a table or figure of one of the two papers again; without a name: list them.

    Writes tables (JSON, CSV), figures (PNG) and one self-contained page, with the published values
    beside ours. On ImageNet the settings are the paper's. Interrupted, the same command goes on
    where it stopped; experiments in the same folder share their trainings.

    Example: casm-fast reproduce table2 --data imagenet:/data/ILSVRC
    """

    name: tyro.conf.Positional[str | None] = None
    """Which one."""

    data: str = "synthetic"
    """Data set: "synthetic" (embedded), "imagenet:DIR", or a folder with train and val."""

    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Fewer images and epochs: minutes on two cores with the embedded set."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=("-o",))] = None
    """Folder of the results (default: reproduce/<data>-<full or quick>)."""

    seeds: int | None = None
    """Number of repeated runs, for experiments that have any (default: the paper's)."""

    device: str = "auto"
    """"auto" (a GPU when there is one), "cpu", "cuda", "cuda:1" ..."""

    amp: Literal["off", "bf16", "fp16"] = "off"
    """Mixed precision of the trainings."""

    workers: int = 4
    """Threads that decode images beside the network."""

    def run(self) -> None:
        """Reproduce, or list."""
        if self.name is None:
            print(f"{listing()}\n\nnext: casm-fast reproduce NAME --quick")
            return
        settings: dict[str, Any] = {} if self.amp == "off" else {"amp": self.amp}
        try:
            result = reproduce(
                self.name,
                data=self.data,
                quick=self.quick,
                output=self.output,
                seeds=self.seeds,
                device=self.device,
                workers=self.workers,
                **settings,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "Everything is saved: the same command goes on where it stopped"
            ) from None
        print(f"\n{result}\n\npage: {result.page}")


@dataclass(frozen=True, kw_only=True)
class OfClassifier(Verb):
    """What verbs take that explain a classifier."""

    model: str = "googlenet"
    """Architecture (torchvision, timm/NAME), or a checkpoint or run folder of casm_fast."""

    weights: str | None = "imagenet"
    """Of an architecture: "imagenet", another name of torchvision's, a file, or None: random."""

    classes: int = 1000
    """Of an architecture."""

    input_size: int | None = None
    """Side of the images in pixels (default: 224, or as the checkpoint was trained)."""

    resize_policy: Literal["crop", "squash"] | None = None
    """Shorter side to the input size and centre crop, or squash (default: crop, or as the
    checkpoint was trained)."""

    device: str = "auto"
    """"auto" (a GPU when there is one), "cpu", "cuda", "cuda:1" ..."""

    def classifier(self) -> Classifier:
        """The one that the options name."""
        return open_classifier(
            self.model, self.weights, self.classes, self.input_size, self.resize_policy
        )


@dataclass(frozen=True, kw_only=True)
class Perturb(OfClassifier):
    """Learn which region of each image a classifier's score needs: meaningful perturbation.

    SOURCE is a photo, a folder, or a data set as for extract. Writes a figure and a mask per image,
    and a row per image to rows.jsonl. Interrupted, the same command goes on where it stopped.

    Example: casm-fast perturb photo.jpg --model googlenet
    """

    source: tyro.conf.Positional[str]
    """Images."""

    target: int | Literal["predicted", "label"] = "predicted"
    """Class whose score counts: the best, each image's label, or one for all."""

    preset: Preset = "default"
    """Settings of one of the paper's experiments; options that differ from the defaults below
    change them."""

    figures: bool = True
    """Draw twelve panels per image."""

    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("perturbed")
    """Folder to write to."""

    config: PerturbConfig = field(default_factory=PerturbConfig)

    def run(self) -> None:
        """Perturb."""
        default = PerturbConfig()
        names = PerturbConfig.__dataclass_fields__
        changes = {
            name: value
            for name in names
            if (value := getattr(self.config, name)) != getattr(default, name)
        }
        classifier = self.classifier()
        try:
            made = perturb_set(
                classifier,
                self.source,
                self.output,
                PerturbConfig.preset(self.preset, **changes),
                target=self.target,
                device=self.device,
                figures=self.figures,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "Finished images are saved: the same command goes on behind them"
            ) from None
        print(made)


@dataclass(frozen=True, kw_only=True)
class Attribute(OfClassifier):
    """Make saliency maps by the comparison methods of both papers.

    SOURCE is a photo, a folder, or a data set as for extract. Writes a picture, the maps and a row
    per image. Interrupted, the same command goes on where it stopped. Without a source: lists the
    methods.

    Example: casm-fast attribute photo.jpg --method grad_cam --model resnet50
    """

    source: tyro.conf.Positional[str | None] = None
    """Images."""

    method: tuple[str, ...] = ("all",)
    """Methods by name; all: every one that the classifier allows."""

    target: int | Literal["predicted", "label"] = "predicted"
    """Class that is explained: the best, each image's label, or one for all."""

    score: Literal["logit", "softmax", "log_softmax"] = "logit"
    """What of the class is explained."""

    option: tuple[str, ...] = ()
    """Options of a single method, NAME=VALUE each, such as layer=layer4."""

    batch_size: int | None = None
    """Images in one pass of the classifier (default: as many as memory holds)."""

    figures: bool = True
    """Draw one picture per image, with all maps."""

    seed: int = 0
    """Of random numbers."""

    output: Annotated[Path, tyro.conf.arg(aliases=("-o",))] = Path("attributed")
    """Folder to write to."""

    def run(self) -> None:
        """Attribute, or list."""
        if self.source is None:
            print(f"{methods()}\n\nnext: casm-fast attribute photo.jpg --method NAME")
            return
        classifier = self.classifier()
        try:
            made = attribute_set(
                classifier,
                self.source,
                self.output,
                self.method,
                target=self.target,
                score=self.score,
                batch_size=self.batch_size,
                seed=self.seed,
                device=self.device,
                figures=self.figures,
                **named_values(self.option),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "Finished images are saved: the same command goes on behind them"
            ) from None
        print(made)


@dataclass(frozen=True, kw_only=True)
class Doctor(Verb):
    """Tell what is installed, which kernels loaded, and what to do about each problem.

    Example: casm-fast doctor
    """

    def run(self) -> None:
        """Examine."""
        findings = doctor.examine()
        print(doctor.render(findings))
        if any(finding.state == "problem" for finding in findings):
            raise SystemExit(REFUSED)


VERBS: dict[str, type[Verb]] = {
    "demo": Demo,
    "train": Train,
    "extract": Extract,
    "evaluate": Evaluate,
    "predict": Predict,
    "export": Export,
    "export-model": ExportModel,
    "report": Report,
    "browse": Browse,
    "perturb": Perturb,
    "attribute": Attribute,
    "reproduce": Reproduce,
    "doctor": Doctor,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        arguments: Words after the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbose = "--verbose" in words
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    level = logging.DEBUG if verbose else logging.INFO if leads() else logging.ERROR
    logging.getLogger("casm_fast").setLevel(level)
    try:
        if HAS_TYRO:
            with contextlib.nullcontext() if leads() else _silence():
                verb = parse(words)
            verb.run()
        elif words[:1] == ["doctor"]:
            Doctor().run()
        else:
            print(NO_TYRO, file=sys.stderr)
            return REFUSED
    except KeyboardInterrupt as stop:
        if leads():
            print(f"casm-fast: interrupted. {stop}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else OK
    except BrokenPipeError:
        # The reader went away (casm-fast evaluate … | head), which is no fault. The interpreter
        # flushes the stream once more at exit and must find one that takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if verbose:
            traceback.print_exc()
        message, code = explain(error)
        print(f"casm-fast: {message}", file=sys.stderr)
        return code
    return OK


def parse(words: Sequence[str]) -> Verb:
    """The verb that the words ask for.

    Raises:
        SystemExit: After help (0), or when the words are not understood (2).
    """
    marks = (
        tyro.conf.OmitArgPrefixes,
        tyro.conf.PositionalMetavarFromFieldName,
    )
    name, *rest = words or ["--help"]
    if name in VERBS:
        return tyro.cli(VERBS[name], prog=f"casm-fast {name}", args=rest, config=marks)
    verbs: Any = Union[  # noqa: UP007 - the members are only known here
        tuple(
            Annotated[verb, tyro.conf.subcommand(name, description=_headline(verb))]
            for name, verb in VERBS.items()
        )
    ]
    chosen: Verb = tyro.cli(
        verbs,
        prog="casm-fast",
        description="Saliency maps that belong to no single classifier, and the boxes they draw. "
        "Start with: casm-fast demo",
        args=[name, *rest],
        config=marks,
    )
    return chosen


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Say nothing: rank 0 reads the same words, and tells what is wrong with them.

    Raises:
        SystemExit: For any error.
    """
    with open(os.devnull, "w") as nothing:
        try:
            with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                yield
        except Exception as error:
            raise SystemExit(REFUSED) from error


def _headline(verb: type[Verb]) -> str:
    """The first sentence of a verb's help."""
    return (verb.__doc__ or "").partition("\n")[0]


def explain(error: Exception) -> tuple[str, int]:
    """One sentence about an error, and the exit code."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU has too little memory: lower --batch-size", REFUSED
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    if isinstance(error, (ValueError, OSError, FloatingPointError, ImportError)):
        return text, REFUSED
    return (
        f"{type(error).__name__}: {text} (a defect of casm_fast; --verbose shows where)",
        DEFECT,
    )


def named_values(words: Sequence[str]) -> dict[str, Any]:
    """Options as words, NAME=VALUE each; a value is a Python literal, or else text.

    Raises:
        ValueError: A word without a name.
    """
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"option: expected NAME=VALUE, such as layer=layer4, got {word!r}")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values


def demo_tree(folder: Path) -> Path:
    """The embedded validation split as JPEG files in ImageNet's layout, written once.

    The tree is complete when its folder has its final name: it is written under another one.
    """
    tree = folder / DEMO_TREE
    if not tree.exists():
        source = open_source(f"synthetic:images={DEMO_IMAGES}", split="val")
        if not isinstance(source, SyntheticSource):
            raise TypeError(f"expected the embedded set, got {type(source).__name__}")
        unfinished = folder / f".{DEMO_TREE}.unfinished"
        folder.mkdir(parents=True, exist_ok=True)
        write_tree(unfinished, None, source, layout="flat")
        unfinished.rename(tree)
    return tree


if __name__ == "__main__":
    sys.exit(main())
