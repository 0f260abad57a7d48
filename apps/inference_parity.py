"""Do a bundle's dtypes answer alike? Each signature on the whole test part, beside the same weights in float32.

Nothing is sampled: the test part is the same for all, so a difference is a number and no estimate. Margins are those
that the field would notice (0.1 points of accuracy, 0.3 of mAP, 0.2 of mIoU, 0.2 BLEU, 0.15 points of error rates,
0.1 dB of SI-SDR, 1% of a distortion). Where one test example is worth more than the margin, at least 99.8% of
the decisions have to be the same instead.
"""

import dataclasses
import types
from pathlib import Path
from typing import Any

import numpy as np

import tfhalf
from apps import figures, parity_report, runner

_REFERENCE = "serving_float32"
_SIGNATURES = ("serving_default", "serving_bfloat16")
_AGREEMENT = 0.998
_MARGINS = {
    "accuracy": 0.001,
    "AP50": 0.003,
    "miou": 0.002,
    "bleu": 0.2,
    "cer": 0.0015,
    "si_sdr_improvement": 0.1,
}
_RELATIVE_MARGIN = 0.01  # of what is none of these, as a distortion


@dataclasses.dataclass(frozen=True)
class Signature:
    """What one signature makes of the test part.

    Attributes:
        name: of the signature.
        scores: by the task's metrics.
        difference: of the deciding metric to the reference's.
        agreement: share of decisions (classes, texts, numbers) that are the reference's; None where there are none.
        equivalent: whether the difference is within the margin, or enough decisions are the same.
    """

    name: str
    scores: dict[str, float]
    difference: float
    agreement: float | None
    equivalent: bool


@dataclasses.dataclass(frozen=True)
class Inference:
    """What was found about a bundle.

    Attributes:
        bundle: its folder.
        dataset: whose test part.
        metric: that decides.
        margin: of that metric.
        trained: scores of the weights before they were stored in half, computed in float32.
        reference: scores of the stored weights, computed in float32.
        signatures: the others.
    """

    bundle: str
    dataset: str
    metric: str
    margin: float
    trained: dict[str, float]
    reference: dict[str, float]
    signatures: list[Signature]

    @property
    def equivalent(self) -> bool:
        """Whether all signatures are."""
        return all(one.equivalent for one in self.signatures)

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as plain JSON values."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """Returns it as a page."""
        names = parity_report.scored(self.reference)
        rows = [
            [
                "weights before storing, in float32",
                *(f"{self.trained.get(name, np.nan):.4f}" for name in names),
                "",
                "",
                "",
            ],
            [_REFERENCE, *(f"{self.reference[name]:.4f}" for name in names), "", "", ""],
        ]
        for one in self.signatures:
            agreement = "" if one.agreement is None else f"{one.agreement:.4%}"
            verdict = "equivalent" if one.equivalent else "different"
            scores = [f"{one.scores[name]:.4f}" for name in names]
            rows.append([one.name, *scores, f"{one.difference:+.5f}", agreement, verdict])
        header = ["computed by", *names, f"difference of {self.metric}", "same decisions", "verdict"]
        title = f"# {self.bundle}: inference in each dtype, whole test part of {self.dataset}"
        told = f"Margin of {self.metric}: {self.margin:.4g}; or {_AGREEMENT:.1%} of decisions the same."
        return f"{title}\n\n{told}\n\n{figures.to_table(header, rows)}\n"


def compare(task: runner.Task, options: types.SimpleNamespace, bundle: Path) -> Inference:
    """Scores a bundle's signatures on the test part of the data set that it was trained on.

    Args:
        task: the app's task.
        options: its parsed flags; those that weren't given are taken from the bundle's run.
        bundle: version folder.

    Raises:
        AppError: the bundle is another task's.
        ExportError: the bundle isn't sound.
    """
    manifest = tfhalf.verify(bundle)
    metadata = manifest.metadata
    if missing := {_REFERENCE, *_SIGNATURES} - set(manifest.signatures):
        raise runner.AppError(
            f"--saved_model={bundle} has no {min(missing)}: it was trained in float32, so that there is nothing "
            "in half to compare; export a run in mixed_float16 or mixed_bfloat16"
        )
    left_open = set(vars(options)) - options.given - {"given", "plan"}
    trained_with = {name: value for name, value in metadata.get("flags", {}).items() if name in left_open}
    task, options = runner.chosen(task, types.SimpleNamespace(**vars(options) | trained_with))
    options = types.SimpleNamespace(**vars(options) | trained_with)  # again, over the chosen task's defaults
    if metadata.get("task") != task.name:
        raise runner.AppError(f"--saved_model={bundle} is of {metadata.get('task')}, and --app makes {task.name}")
    options.plan = tfhalf.PrecisionPlan.from_json(metadata["plan"])
    data = runner.load(task, options)
    reference, decided = _scored(task, data, bundle, _REFERENCE)
    margin = _MARGINS.get(task.metric, _RELATIVE_MARGIN * abs(reference[task.metric]))
    found = []
    for name in _SIGNATURES:
        scores, decisions = _scored(task, data, bundle, name)
        difference = scores[task.metric] - reference[task.metric]
        agreement = _agreement(decided, decisions)
        one = 1 / scores["total"] if "correct" in scores else 0.0
        found.append(Signature(name, scores, difference, agreement, is_alike(difference, margin, agreement, one)))
    trained = metadata["metrics"].get("trained, in float32", metadata["metrics"]["trained"])
    return Inference(str(bundle), options.dataset, task.metric, margin, trained, reference, found)


def is_alike(difference: float, margin: float, agreement: float | None, one_example: float) -> bool:
    """Returns whether a dtype answers as float32 does.

    Args:
        difference: of the deciding metric.
        margin: of it.
        agreement: share of decisions that are the same; None where there are none.
        one_example: what one test example adds to the metric; where that is more than the margin, the decisions count.
    """
    if agreement is not None and one_example > margin:
        return agreement >= _AGREEMENT
    return abs(difference) <= margin + 1e-9  # 0.661 - 0.660 is more than 0.001 in binary


def _scored(task: runner.Task, data: runner.Data, bundle: Path, signature: str) -> tuple[dict[str, float], list]:
    served, decisions = tfhalf.load_saved_model(bundle, signature), []

    def call(**inputs):
        outputs = served(inputs)
        decisions.append(_decisions(outputs))
        return outputs

    return task.score(call, data), decisions


def _decisions(outputs) -> list[np.ndarray]:
    """What was decided: texts and whole numbers, or else the likeliest classes."""
    arrays = {name: np.asarray(output) for name, output in outputs.items()}
    whole = [array for _, array in sorted(arrays.items()) if array.dtype.kind in "iuSOU"]
    return whole or [array.argmax(-1) for name, array in sorted(arrays.items()) if name == "probabilities"]


def _agreement(one: list, other: list) -> float | None:
    same = total = 0
    for decided, decisions in zip(one, other, strict=True):
        for left, right in zip(decided, decisions, strict=True):
            total += max(left.size, right.size)
            same += int(np.sum(left == right)) if left.shape == right.shape else 0
    return same / total if total else None
