"""Numbers of a report, by hand; pages that stand alone."""

import base64
import dataclasses
import html.parser
import json
import math
import re
from pathlib import Path

import pytest

from apps import parity_report
from apps.paired_runs import Result, Run

MARGINS = {
    "metrics": {"accuracy": 0.02, "loss": 0.1, "cer": 0.0},
    "source": "as --margin states",
    "stated": "2026-01-02",
}


def result(policy: str, seed: int, accuracy: float, seconds: float, gibibytes: float, skipped: int = 0) -> Result:
    run = Run(policy, seed, Path("nowhere"), [])
    if math.isnan(accuracy):
        return Result(run, {}, "training stopped | <b>", [], 0)
    epochs = [{"seconds": s, "loss": 1.0, "val_loss": s, "skipped_steps": skipped} for s in (99.0, seconds, seconds)]
    scores = {"loss": 1 - accuracy, "accuracy": accuracy, "cer": 0.5, "correct": 9, "total": 10}
    return Result(run, scores, "", epochs, int(gibibytes * 2**30))


def report(*halves: float) -> parity_report.Report:
    pairs = [
        (result("float32", seed, 0.9, 2.0, 1.0), result("mixed_float16", seed, half, 1.0 + seed, 0.5, skipped=seed))
        for seed, half in enumerate(halves)
    ]
    return parity_report.Report.of("image.some", "accuracy", "mixed_float16", pairs, MARGINS, "python -m apps.parity")


def test_speed_memory_and_skipped_steps_by_hand():
    made = report(0.90, 0.91, 0.89)
    assert made.speed == (1.0, 0.5, 1.5)
    assert made.memory == 0.5
    assert made.skipped_steps == 3
    assert made.means("accuracy") == ["0.9000 ± 0.0000", "0.9000 ± 0.0100"]
    assert set(made.verdicts) == {"accuracy", "loss"}  # what has no margin has no verdict


def test_times_of_twins_that_ran_at_other_times_are_not_compared():
    pairs = [(result("float32", seed, 0.9, 2.0, 1.0), result("mixed_float16", seed, 0.9, 1.0, 1.0)) for seed in (0, 1)]
    pairs[0] = (pairs[0][0], dataclasses.replace(pairs[0][1], ended=40.0))  # of 101 s, 63 s beside its twin
    pairs[1] = (pairs[1][0], dataclasses.replace(pairs[1][1], epochs=pairs[1][1].epochs * 2, ended=160.0))  # of 202
    arguments = ("image.some", "accuracy", "mixed_float16")
    made = parity_report.Report.of(*arguments, pairs, MARGINS, "")
    assert made.speed == (0.5, 0.5, 0.5)
    made = parity_report.Report.of(*arguments, [pairs[1]] * 2, MARGINS, "")
    assert "times can't be compared, memory 1.000" in made.summary()
    assert "Times can't be compared" in made.to_markdown("half.png")
    assert "nan times" not in made.to_markdown("half.png")


def test_page_holds_all_that_was_measured():
    text = report(0.90, 0.91, 0.89).to_markdown("half.png")
    assert (
        "| accuracy | 0.9000 ± 0.0000 | 0.9000 ± 0.0100 | +0.0000 | -0.0169 to +0.0169 | 0.0200 | equivalent |" in text
    )
    assert "| 1 | 0.9000 | 0.9100 | +0.0100 | 2.00 | 2.00 | 1.00 | 0.50 | 1 |" in text
    assert text.index("| accuracy") < text.index("| loss")  # what decides comes first
    assert "stated 2026-01-02, before the runs that are judged: as --margin states" in text


def test_a_failed_run_is_shown_and_breaks_no_table():
    made = report(0.90, math.nan, 0.91)
    text = made.to_markdown("half.png")
    assert "**different**" in text
    assert "training stopped &#124; &lt;b>" in text
    assert len({line.count(" | ") for line in text.splitlines() if re.match(r"\| [012] ", line)}) == 1
    json.dumps(made.to_json(), allow_nan=False)
    assert made.pictures()[".png"].startswith(b"\x89PNG")


def test_html_is_one_file_with_its_picture_and_tables():
    made = report(0.90, 0.91)
    pictures = made.pictures()
    page = parity_report.to_html(made.to_markdown("half.png"), {"half.png": pictures[".png"]})
    seen = []

    class Parser(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append((tag, dict(attrs)))

    Parser().feed(page)
    (image,) = (attributes for tag, attributes in seen if tag == "img")
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == pictures[".png"]
    assert [tag for tag, _ in seen].count("table") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<title>image.some: mixed_float16 against float32</title>" in page


def test_margins_of_pilots_are_by_metric_and_count_examples():
    pilots = [{"accuracy": a, "loss": a / 2, "correct": 1, "total": 100} for a in (0.90, 0.91, 0.92)]
    assert parity_report.margins(pilots) == {"accuracy": pytest.approx(0.02), "loss": pytest.approx(0.01)}
    same = [{"accuracy": 0.9, "loss": 0.4, "correct": 90, "total": 100}] * 2
    assert parity_report.margins(same) == {"accuracy": 0.01, "loss": 0.0}
