"""Blanks shared out by hand, a bundle that hears what its model hears, alignments against it, wrong bundles."""

import shutil

import numpy as np
import pytest
import tensorflow as tf

import tfhalf
from apps import runner
from apps.audio import listener, recognition, spectra
from tests.fakes import export_recogniser


@pytest.mark.parametrize(
    ("path", "is_pause", "expected"),
    [
        # "ab": of three blanks between two sounds the former gets two.
        ([0, 0, 1, 1, 2, 2, 2, 3, 4, 4, 4], [False, False], [1, 2 + 1 + 2, 1 + 1 + 2, 1]),
        # "a b": what is beside the pause is the pause's, but for two steps behind a and one before b.
        ([1, 2, 2, 2, 2, 3, 4, 4, 4, 5], [False, True, False], [0, 1 + 2, 2 + 1 + 2, 1 + 1, 0]),
        ([1, 2, 3, 4, 5], [False, True, False], [0, 1 + 1, 1 + 0, 1 + 1, 0]),
        ([1, 3], [False, False], [0, 1, 1, 0]),
        ([0, 0], [], [1, 1]),
        ([-1, -1], [False], [0, 0, 0]),
        ([], [False], [0, 0, 0]),
    ],
)
def test_blanks_are_shared_out(path, is_pause, expected):
    seen = listener.share_blanks(np.array(path, int), np.array(is_pause, bool))
    assert seen.tolist() == expected
    assert seen.sum() in (len(path), 0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Two versions of a recogniser that wasn't trained: their folder, the model, its data."""
    folder = tmp_path_factory.mktemp("models") / "recogniser"
    model, data = export_recogniser(folder / "2", [" ", "a", "b"])
    shutil.copytree(folder / "2", folder / "10")
    return folder, model, data


def test_it_hears_what_the_model_hears_in_float32(exported):
    folder, model, data = exported
    heard = listener.Listener(folder, 16_000)
    assert heard.folder == folder / "10"
    assert heard.alphabet.characters == [" ", "a", "b"]
    random = np.random.default_rng(1)
    sounds = [random.normal(scale=0.1, size=size).astype("float32") for size in (9000, 3000, 16_000, 1)]
    with tfhalf.precision.computing_in(model, "float32"):
        call = runner.answering(recognition.TASK, model, data)
        expected = [
            call(waveform=tf.constant(sound[np.newaxis]), length=tf.constant([len(sound)]))["text"].numpy()[0].decode()
            for sound in sounds
        ]
    assert len(set(expected)) > 1, "it hears nothing"
    assert heard.transcribe(sounds) == expected
    assert heard.transcribe([]) == []


def test_every_frame_of_a_clip_belongs_to_a_label(exported):
    heard = listener.Listener(exported[0] / "2", 16_000)
    random = np.random.default_rng(2)
    sounds = [random.normal(scale=0.1, size=size).astype("float32") for size in (16_000, 7777, 1000)]
    labels = [heard.alphabet.encode(text) for text in ("ab a", "bb", "abab")]
    durations = heard.align(sounds, labels, stride=160)
    for sound, own, frames in zip(sounds[:2], labels, durations, strict=False):
        assert len(frames) == len(own) + 2
        assert frames[1:-1].all()
        assert frames.sum() == spectra.num_frames(len(sound), spectra.framing(16_000))
    assert not durations[2].any()  # two steps for four letters


def test_what_is_no_recogniser_is_refused(exported, bundle, tmp_path):
    with pytest.raises(runner.AppError, match=r"--recogniser.*no bundle"):
        listener.Listener(tmp_path, 16_000)
    with pytest.raises(runner.AppError, match=r"--recogniser.*is for 'test'"):
        listener.Listener(bundle, 16_000)
    with pytest.raises(runner.AppError, match=r"--recogniser.*hears 16000 samples a second, and not 8000"):
        listener.Listener(exported[0], 8000)
