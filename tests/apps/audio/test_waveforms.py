"""Sound files of every kind and damage, rates against scipy's resampling and against sines, writing that replaces."""

import io
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import scipy.signal
import soundfile
import soxr

from apps.audio import waveforms

FORMATS = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")]
CONTAINERS = [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")]
LOSSES = {"PCM_16": 2.0**-15, "FLOAT": 0.0, "VORBIS": 0.05}


def encode(samples, rate=16_000, container="WAV", subtype="PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def sine(frequency: float, rate: int, seconds: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def noise(seconds: float = 20.0, rate: int = 16_000) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).normal(size=round(rate * seconds))


# Reading


@pytest.mark.parametrize(("container", "subtype"), FORMATS)
def test_every_format_from_a_file_and_from_memory(tmp_path, container, subtype):
    samples = sine(440, 16_000, 0.5)
    data = encode(samples, container=container, subtype=subtype)
    (tmp_path / "größe.sound").write_bytes(data)
    read = [
        waveforms.read(source, 16_000) for source in (data, tmp_path / "größe.sound", str(tmp_path / "größe.sound"))
    ]
    for result in read:
        assert result.dtype == np.float32
        assert result.shape == (8_000,)
        np.testing.assert_allclose(result, samples, rtol=1e-6, atol=LOSSES[subtype])


def test_channels_are_averaged():
    left, right = sine(440, 16_000, 0.2), sine(1_000, 16_000, 0.2)
    stereo = np.stack([left, right, np.zeros_like(left)], axis=1)
    result = waveforms.read(encode(stereo, subtype="FLOAT"), 16_000)
    np.testing.assert_allclose(result, (left + right) / 3, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_becomes_the_wanted_one(rate):
    # 5 blocks and more at the highest rates; a sine below all of the rates' halves stays a sine.
    seconds = 4.0
    result = waveforms.read(encode(sine(1_000, rate, seconds), rate, subtype="FLOAT"), 16_000)
    assert len(result) == 64_000
    middle = slice(1_000, -1_000)
    np.testing.assert_allclose(result[middle], sine(1_000, 16_000, seconds)[middle], atol=1e-4)


def test_what_the_new_rate_cannot_hold_is_gone_as_by_scipy():
    samples = sine(1_000, 48_000, 1.0) + sine(15_000, 48_000, 1.0)  # 15 kHz would come back at 1 kHz
    result = waveforms.read(encode(samples, 48_000, subtype="FLOAT"), 16_000)
    expected = scipy.signal.resample_poly(samples, 1, 3, window=("kaiser", 12.0))
    middle = slice(500, -500)
    np.testing.assert_allclose(result[middle], expected[middle], atol=0.01)
    np.testing.assert_allclose(result[middle], sine(1_000, 16_000, 1.0)[middle], atol=1e-4)


def test_blocks_have_no_seams():
    samples = noise(seconds=200_000 / 44_100, rate=44_100).astype("float32")  # more than three blocks
    read = waveforms.read(encode(samples, 44_100, subtype="FLOAT"), 16_000)
    np.testing.assert_allclose(read, soxr.resample(samples, 44_100, 16_000), atol=1e-6)


def test_a_long_file_with_many_channels_takes_little_memory(tmp_path):
    # 8 channels of 48 kHz as float32 are 96 MB for these 62.5 seconds, what comes out is 2 MB.
    path = tmp_path / "long.flac"
    path.write_bytes(encode(np.zeros([3_000_000, 8], "int16"), 48_000, "FLAC"))
    program = (
        "import resource, sys; from apps.audio import waveforms\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(waveforms.read(sys.argv[1], 8_000)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    output = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True).stdout
    samples, kilobytes = map(int, output.split())
    assert samples == 500_000
    assert kilobytes < 30_000


def test_one_sample_and_what_is_beyond_full_scale():
    np.testing.assert_array_equal(waveforms.read(encode([0.5]), 16_000), [0.5])
    assert len(waveforms.read(encode([0.5], 8_000), 16_000)) == 2
    loud = np.array([3.0, -3.0, 1.0, -1.0])
    np.testing.assert_array_equal(waveforms.read(encode(loud, subtype="FLOAT"), 16_000), loud)
    clipped = waveforms.read(encode(loud), 16_000)
    np.testing.assert_allclose(clipped, np.clip(loud, -1, 1), atol=2.0**-15)
    assert not waveforms.read(encode(np.zeros(100)), 16_000).any()


# Damage


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"The quick brown fox\n" * 50, "is no whole WAV, FLAC or OGG file .*ffmpeg"),
        (bytes(4_000), "is no whole WAV"),
        (encode(np.zeros(0)), r"holds no sound \(0 samples at 16000 Hz\)"),
        (encode([0.5], 48_000), r"holds no sound \(1 samples at 48000 Hz\)"),
        (encode([0.5, np.nan, 0.5], subtype="FLOAT"), "holds samples that aren't finite"),
        (encode([0.5, np.inf, 0.5], subtype="FLOAT"), "holds samples that aren't finite"),
    ],
    ids=["nothing", "text", "zeros", "no samples", "too short", "nan", "inf"],
)
def test_what_is_not_sound_is_told(tmp_path, data, message):
    path = tmp_path / "some.wav"
    path.write_bytes(data)
    with pytest.raises(waveforms.WaveformError, match=f"some.wav {message}"):
        waveforms.read(path, 16_000)
    with pytest.raises(waveforms.WaveformError, match=f"^sound in memory {message}"):
        waveforms.read(data, 16_000)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(waveforms.WaveformError, match=r"missing\.wav: No such file"):
        waveforms.read(tmp_path / "missing.wav", 16_000)
    with pytest.raises(waveforms.WaveformError, match="Is a directory"):
        waveforms.read(tmp_path, 16_000)


@pytest.mark.parametrize(("container", "subtype"), CONTAINERS)
def test_a_file_that_was_cut_off_is_refused(tmp_path, container, subtype):
    data = encode(noise(), container=container, subtype=subtype)
    assert len(waveforms.read(data, 16_000)) == 320_000
    pages = [place for place in range(len(data)) if data[place : place + 4] == b"OggS"]
    for length in (1, 30, 60, 1_000, len(data) // 2, len(data) * 9 // 10, len(data) - 1, *pages[-3:]):
        with pytest.raises(waveforms.WaveformError, match=r"cut off after|is no whole|holds no sound"):
            waveforms.read(data[:length], 16_000)
    path = tmp_path / "half.sound"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(waveforms.WaveformError, match=r"half\.sound .*again"):
        waveforms.read(path, 16_000)


@pytest.mark.parametrize(("container", "subtype"), CONTAINERS)
def test_what_stands_behind_the_sound_does_no_harm(container, subtype):
    data = encode(noise(1.0), container=container, subtype=subtype)
    assert len(waveforms.read(data + b"TAG" + bytes(125), 16_000)) == 16_000


@pytest.mark.parametrize("promised", [0xFFFFFFFF, 0x7FFFFFFF - 36, 0x80000000])
def test_a_header_from_before_the_length_was_known(promised):
    data = bytearray(encode(noise(1.0)))
    data[40:44] = struct.pack("<I", promised)
    assert len(waveforms.read(bytes(data), 16_000)) == 16_000


# Writing


def test_what_was_written_is_read_again(tmp_path):
    path, samples = tmp_path / "a.wav", noise(0.1).astype("float32")
    waveforms.write(path, samples, 22_050)
    info = soundfile.info(path)
    assert (info.format, info.subtype, info.channels, info.samplerate) == ("WAV", "PCM_16", 1, 22_050)
    np.testing.assert_allclose(waveforms.read(path, 22_050), samples, atol=2.0**-15)
    waveforms.write(str(path), np.array([2.0, -2.0, 0.25]), 8_000)
    np.testing.assert_allclose(waveforms.read(path, 8_000), [1.0, -1.0, 0.25], atol=2.0**-15)
    assert os.listdir(tmp_path) == ["a.wav"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.wav"
    waveforms.write(path, np.full(100, 0.5), 8_000)
    for bad in (np.array([0.5, np.nan]), np.zeros([2, 2]), np.float32(0.5)):
        with pytest.raises(ValueError, match=r"a.wav: a waveform is \[samples\]"):
            waveforms.write(path, bad, 8_000)
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        waveforms.write(tmp_path / "folder", np.zeros(10), 8_000)
    # As on a full disk: the kernel refuses what is beyond 10,000 bytes.
    program = (
        "import resource, signal, sys, numpy; from apps.audio import waveforms\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "waveforms.write(sys.argv[1], numpy.zeros(100_000), 8_000)"
    )
    failed = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
    assert "OSError: [Errno 27] File too large" in failed.stderr
    np.testing.assert_allclose(waveforms.read(path, 8_000), np.full(100, 0.5), atol=2.0**-15)
    assert sorted(os.listdir(tmp_path)) == ["a.wav", "folder"]


def test_neither_keras_nor_tensorflow_is_loaded():
    program = "import sys; from apps.audio import waveforms; print({'keras', 'tensorflow', 'tfhalf'} & {*sys.modules})"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
