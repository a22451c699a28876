"""`transclip-fast demo`: from images to labels, offline, on handwritten digits."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from transclip_fast.cli import options, session
from transclip_fast.cli.encode import encode_progress
from transclip_fast.cli.report import describe_report
from transclip_fast.cli.run import REPORT, solve_folder
from transclip_fast.cli.session import counted
from transclip_fast.data.feature_rows import evenly_spaced_rows
from transclip_fast.demo import CLASS_NAMES, SHIFTS, TEMPLATES, class_prompts
from transclip_fast.demo.data import SIDE_PIXELS, write_images
from transclip_fast.demo.model import backbone
from transclip_fast.device import resolve_device
from transclip_fast.encode.folder import encode_source
from transclip_fast.encode.sources import open_source
from transclip_fast.errors import InputError
from transclip_fast.estimator import TransCLIP
from transclip_fast.report.page import check_page_file, write_report
from transclip_fast.store.atomic import read_json, write_json, writing
from transclip_fast.store.results import load_result
from transclip_fast.whole_files import new_file

PLAIN = "plain"
PICTURE, RUN = "changed.png", "run.json"
SHOWN_IMAGES = 8  # in a row of the picture
MARGIN, HEADING, CAPTION = 12, 22, 18  # pixels
GREEN, RED, GREY, INK = (24, 122, 58), (176, 42, 48), (110, 110, 110), (20, 20, 20)
LEGEND = ((165, "corrected", GREEN), (235, "broken", RED), (295, "both wrong", GREY))


@click.command("demo")
@click.option(
    "--out", default="transclip-demo", type=options.PATH, help="Folder to write, or write again."
)
@options.device_option
@options.json_option
def command(out: str, device: str, as_json: bool) -> None:
    """Label handwritten digits with a very small CLIP, zero-shot and jointly, without a network.

    Four sets of the same held-out digits, one plain and three visibly shifted, are written as PNG
    files, encoded and solved like any other images. --out receives every stage's folder, and
    report.html, which shows the set with the most changes in a browser.

    \b
    Example:
      transclip-fast demo --out transclip-demo
    """
    with session.collected_warnings({}):
        summary, text = _demo(Path(out), device)
    session.print_summary(summary, text, as_json)


def _demo(folder: Path, device: str) -> tuple[dict[str, Any], str]:
    """Write all that `command` says; the summary, and its text."""
    started = time.perf_counter()
    _check_place(folder)
    check_page_file(folder / REPORT)
    shifts = [*reversed(SHIFTS)]  # those with most to gain first, plain last
    runs = {shift: _label(folder / shift.replace(" ", "-"), shift, device) for shift in shifts}
    picture, report = folder / PICTURE, folder / REPORT
    most = max(runs, key=lambda shift: runs[shift]["n_flipped"])
    page = write_report(folder / most.replace(" ", "-") / "result", report)
    summary = _summary(runs, time.perf_counter() - started) | {"report": str(report)}
    image = _picture(folder, shifts)
    with writing(folder):
        with new_file(picture) as unfinished:
            image.save(unfinished, "png")
        with new_file(folder / RUN) as unfinished:
            write_json(unfinished, summary)
    return summary, f"{_text(runs, summary, picture)}\n{describe_report(page, report)}"


def _check_place(folder: Path) -> None:
    """InputError if the folder holds files, and neither a demo nor one that was killed."""
    run, own = folder / RUN, {PICTURE, REPORT, *(shift.replace(" ", "-") for shift in SHIFTS)}
    if not folder.is_dir() or (run.exists() and "sets" in read_json(run)):
        return
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if others := sorted(names - own):
        raise InputError(f"{folder}: holds other files ({others[0]}); name a new folder")


def _label(folder: Path, shift: str, device: str) -> dict[str, Any]:
    """Write, encode and solve one set of images; its run.json."""
    loaded = backbone(device=resolve_device(device))
    with writing(folder):
        write_images(folder / "images", shift)
    source = open_source(folder / "images", labels_from_folders=True)
    with encode_progress() as progress:
        encoded = encode_source(
            source, loaded, folder / "features", class_prompts(), progress=progress
        )
    return solve_folder(folder, TransCLIP(device=device), stages=session.Stages(encoded.seconds))


def _summary(runs: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    shifted = [run for shift, run in runs.items() if shift != PLAIN]
    keys = ("zero_shot_accuracy", "accuracy")
    means = {key: round(float(np.mean([run[key] for run in shifted])), 4) for key in keys}
    shown = (*keys, "n_queries", "n_flipped")
    return {
        **means,
        "accuracy_is": "the mean over the shifted sets, all but plain",
        "sets": {shift: {key: run[key] for key in shown} for shift, run in runs.items()},
        "data": "the last 892 of scikit-learn's handwritten digits; none was seen in training",
        "model": "a CLIP of 1.7 million parameters that this project trained on other digits",
        "seconds": round(seconds, 2),
        "versions": session.versions(),
    }


def _text(runs: dict[str, dict[str, Any]], summary: dict[str, Any], picture: Path) -> str:
    n_images = next(iter(runs.values()))["n_queries"]
    lines = [
        f"{n_images} handwritten digits (UCI, from scikit-learn), labelled by a very small CLIP",
        "that this project trained on other digits, with prompts such as",
        f'"{TEMPLATES[0].format("seven")}" It knows nothing but digits.',
        "",
        "images           zero-shot  transductive     gain  labels changed",
    ]
    for shift, run in runs.items():
        before, after = run["zero_shot_accuracy"], run["accuracy"]
        lines.append(
            f"{shift:15}  {before:7.2f} %     {after:7.2f} %  {after - before:+7.2f}  "
            f"{run['n_flipped']:14}"
        )
    lines += [
        "",
        "Transduction gains where the images have shifted and may cost a little where the model is",
        "nearly right already. This is one trained model; transclip_fast/demo/README.md has three.",
        f"{summary['seconds']:.0f} s. Images whose label changed: {picture}",
        "A page to look at and to correct, for the browser, is the report:",
    ]
    return "\n".join(lines)


def _picture(folder: Path, shifts: list[str]) -> Image.Image:
    """Of each shift a row of images whose label changed, evenly spaced among all of them."""
    row_height, cell = HEADING + SIDE_PIXELS + CAPTION + MARGIN, SIDE_PIXELS + 3 * MARGIN
    height = MARGIN + HEADING + len(shifts) * row_height
    sheet = Image.new("RGB", (MARGIN + SHOWN_IMAGES * cell, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    draw.text((MARGIN, MARGIN), "zero-shot > transductive:", INK, font)
    for x, word, colour in LEGEND:
        draw.text((x, MARGIN), word, colour, font)
    for place, shift in enumerate(shifts):
        top = MARGIN + HEADING + place * row_height
        stages = folder / shift.replace(" ", "-")
        table = load_result(stages / "result").predictions
        label, zero_shot, truth = (
            table.column(name).to_numpy() for name in ("label", "zero_shot_label", "true_label")
        )
        changed = np.flatnonzero(label != zero_shot)
        draw.text((MARGIN, top), f"{shift}: {counted(len(changed), 'label')} changed", INK, font)
        some = changed[evenly_spaced_rows(len(changed), SHOWN_IMAGES).numpy()]
        for column, row in enumerate(some):
            left = MARGIN + column * cell
            with Image.open(stages / "images" / table.column("key")[int(row)].as_py()) as image:
                sheet.paste(image.convert("RGB"), (left, top + HEADING - 4))
            right = label[row] == truth[row]
            colour = GREEN if right else RED if zero_shot[row] == truth[row] else GREY
            caption = f"{CLASS_NAMES[zero_shot[row]]} > {CLASS_NAMES[label[row]]}"
            draw.text((left, top + HEADING + SIDE_PIXELS - 2), caption, colour, font)
    return sheet
