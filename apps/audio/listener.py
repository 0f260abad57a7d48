"""A recogniser that was exported, as other programs use it: what is said in a clip, and when is each character said.

Its weights compute in float32, so that what it hears doesn't depend on the policy of what it is asked about.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

import tfhalf
from apps import runner
from apps.audio import alphabet, ctc, spectra

_BATCH = 16
_SIGNATURE = "serving_float32"
_BEGIN, _END = 1, 2  # steps of a sound beside a pause, before the one that CTC gives it and behind; not tuned


class Listener:
    """A bundle of apps/audio/recognition.py.

    Args:
        folder: a version folder, or the one above it, of which the newest version is taken.
        sampling_rate: samples a second of the clips that it is asked about.

    Raises:
        AppError: there is no bundle, it was changed, it isn't a recogniser's, or it hears another rate.
    """

    def __init__(self, folder: str | Path, sampling_rate: int):
        versions = [entry for entry in Path(folder).glob("*") if entry.name.isdigit() and entry.is_dir()]
        self.folder = max(versions, key=lambda entry: int(entry.name)) if versions else Path(folder)
        try:
            manifest = tfhalf.Manifest.read(self.folder)
            if manifest.metadata.get("task") != "speech_recognition":
                raise runner.AppError(f"--recogniser: {folder} is for {manifest.metadata.get('task')!r}")
            self._listen = tfhalf.load_saved_model(self.folder, f"{_SIGNATURE}_raw")
        except tfhalf.ExportError as error:
            raise runner.AppError(f"--recogniser: {folder} is no bundle that can be used: {error}") from error
        about = manifest.metadata["about"]
        if about["sampling_rate"] != sampling_rate:
            raise runner.AppError(
                f"--recogniser: {folder} hears {about['sampling_rate']} samples a second, and not {sampling_rate}; "
                "choose another one"
            )
        self.alphabet = alphabet.Alphabet(about["characters"])
        self._align = tf.function(ctc.align, autograph=False, reduce_retracing=True)

    @functools.cached_property
    def _transcribe(self):
        return tfhalf.load_saved_model(self.folder, _SIGNATURE)

    def transcribe(self, sounds: Sequence[np.ndarray]) -> list[str]:
        """Returns normalised texts of waveforms, float `[samples]`."""
        texts = [""] * len(sounds)
        for rows, inputs in self._batches(sounds):
            for row, text in zip(rows, self._transcribe(inputs)["text"], strict=True):
                texts[row] = text.decode()
        return texts

    def align(self, sounds: Sequence[np.ndarray], labels: Sequence[np.ndarray], stride: int) -> list[np.ndarray]:
        """Finds out how long each label is said, and the silence around a text.

        Args:
            sounds: waveforms, float32 `[samples]` each.
            labels: of `alphabet`, int32 `[labels]` each.
            stride: samples from one frame to the next.

        Returns:
            Frames of the silence before the text, of each label, and of the silence behind, int32 `[labels + 2]` each,
            in all as many as `spectra.LogMel` has for the clip; all 0 where the clip has fewer steps than the text
            needs. Labels have 1 or more, silences 0 or more.
        """
        durations = [np.zeros(0, np.int32)] * len(sounds)
        pause = self.alphabet.encode(" ")[0]
        for rows, inputs in self._batches(sounds):
            heard = self._listen(inputs)
            own = tf.ragged.stack([tf.constant(labels[row], tf.int32) for row in rows]).to_tensor(ctc.BLANK)
            states = self._align(heard["log_probs"], heard["num_steps"], own).states.numpy()
            for row, path, num_steps in zip(rows, states, heard["num_steps"], strict=True):
                num_frames = spectra.num_frames(len(sounds[row]), spectra.Framing(2 * stride, stride))
                steps = share_blanks(path[:num_steps], labels[row] == pause)
                ends = np.round(np.cumsum(steps) * num_frames / num_steps).astype(np.int32)
                durations[row] = np.diff(ends, prepend=np.int32(0))
        return durations

    def _batches(self, sounds: Sequence[np.ndarray]):
        """Rows of clips of similar length, and what the bundle takes."""
        order = np.argsort([len(sound) for sound in sounds], kind="stable")
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            lengths = np.array([len(sounds[row]) for row in rows], np.int32)
            waveforms = np.zeros([len(rows), lengths.max()], np.float32)
            for index, row in enumerate(rows):
                waveforms[index, : lengths[index]] = sounds[row]
            yield rows, {"waveform": waveforms, "length": lengths}


def share_blanks(path: np.ndarray, is_pause: np.ndarray) -> np.ndarray:
    """Returns the steps of each label, with those of the blanks around it.

    CTC gives a label a step or two of the time that it is said in. Of blanks between two sounds half belongs to each,
    the odd one to the former. Beside a pause they are the pause's, but for two that end a sound and one that begins it.

    Args:
        path: `ctc.Alignment.states` of a clip's own steps, int `[steps]`.
        is_pause: of each label, whether it is the space between words, bool `[labels]`.

    Returns:
        int `[labels + 2]`: the silence before, the labels, the silence behind; all 0 if there is no path.
    """
    num = len(is_pause)
    if len(path) == 0 or path.min() < 0:
        return np.zeros(num + 2, int)
    counts = np.bincount(path, minlength=2 * num + 1)
    steps, blanks = np.concatenate([[0], counts[1::2], [0]]), counts[0::2]
    is_pause = np.concatenate([[True], is_pause, [True]])
    for index, count in enumerate(blanks):  # between `index` and the one behind it
        if is_pause[index] == is_pause[index + 1]:
            former = count - count // 2
        elif is_pause[index]:
            former = count - min(count, _BEGIN)
        else:
            former = min(count, _END)
        steps[index] += former
        steps[index + 1] += count - former
    return steps
