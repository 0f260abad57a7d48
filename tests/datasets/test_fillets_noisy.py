"""fillets_noisy, from stand-ins and from the real packages."""

import shutil
from collections import Counter

import numpy as np
import pytest
import scipy.signal
import soundfile
import tensorflow_datasets as tfds

from tests import fakes
from tfhalf import datasets
from tfhalf.datasets import DatasetError, fillets_noisy

# Of 16 levels two test and two validate, of 12 noises two and two.
LEVELS = "airplane alibaba atlantis aztec barrel bathroom briefcase broom cannons cave city dump".split()  # noqa: SIM905
LEVELS += ["elk", "gems", "hole", "reef"]
NOISES = [f"{word}{number}" for word in ("Build", "CoalMine", "Farm", "Harbor", "Mill", "Water") for number in (1, 2)]


def write_stand_in(folder, amplitude: float = 0.2) -> None:
    """Writes two sentences a level, and a sound of nothing; a second of noise a file, 2 to 3,000 Hz with an offset."""
    for level in LEVELS:
        script = "".join(f'dialogId("{n}", "font_big", "E")\ndialogStr("{n} in {level}.")\n' for n in ("a", "b", "c"))
        fakes.write_dialogues(folder, f"{level}/", "nl", script, "a", "b")
        fakes.write_sound(folder / "sound" / level / "nl" / "c.ogg", np.zeros([0, 2]), 22050)
    for number, name in enumerate(NOISES):
        random = np.random.default_rng(number)
        noise = scipy.signal.sosfilt(
            scipy.signal.butter(4, [2, 3000], "bandpass", fs=11025, output="sos"), random.normal(size=11025)
        )
        fakes.write_sound(folder / "noises" / f"{name}.wav", amplitude * noise / np.abs(noise).max() + 0.1, 11025)


def prepare(manual_dir, data_dir) -> dict[str, list]:
    builder = fillets_noisy.FilletsNoisy(data_dir=data_dir)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual_dir))
    return read(builder)


def read(builder) -> dict[str, list]:
    return {split: list(builder.as_dataset(split=split).as_numpy_iterator()) for split in builder.info.splits}


def parts_of(example) -> tuple[np.ndarray, np.ndarray]:
    """Clean and noise as floats."""
    assert example["noisy"].dtype == example["clean"].dtype == np.int16
    assert example["noisy"].shape == example["clean"].shape
    clean = example["clean"].astype(float)
    return clean, example["noisy"].astype(float) - clean


def decibels(example) -> float:
    clean, noise = parts_of(example)
    return 10 * np.log10(np.sum(clean**2) / np.sum(noise**2))


def assert_disjoint(parts, *keys: str) -> None:
    for key in keys:
        owners = {}
        for split, examples in parts.items():
            for example in examples:
                assert owners.setdefault(example[key], split) == split, example[key]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_in")
    write_stand_in(folder)
    return prepare(folder, folder / "data"), folder


def test_stand_in_counts_and_ratios(stand_in):
    parts, _ = stand_in
    # Two clips a level; to train each once, else at each of four ratios.
    assert {split: len(examples) for split, examples in parts.items()} == {"train": 24, "validation": 16, "test": 16}
    for split in ("validation", "test"):
        assert Counter(float(e["snr"]) for e in parts[split]) == {-5.0: 4, 0.0: 4, 5.0: 4, 10.0: 4}
    assert {float(e["snr"]) for e in parts["train"]} == {-5.0, 0.0, 5.0, 10.0, 15.0}
    for examples in parts.values():
        for example in examples:
            level, name, ratio = example["id"].decode().split("/")
            assert (level, f"{example['snr']:.0f}dB") == (example["level"].decode(), ratio)
            assert name in ("a", "b")


def test_ratio_is_that_of_the_energies(stand_in):
    for examples in stand_in[0].values():
        for example in examples:
            assert decibels(example) == pytest.approx(float(example["snr"]), abs=0.01)


def test_ratio_counts_all_of_a_part():
    random = np.random.default_rng(0)  # a part of a noise may have a mean, that of a slow wave
    noisy, clean = fillets_noisy._mix(random.integers(-5000, 5000, 2000), random.normal(size=2000) + 2, 5)
    assert decibels({"noisy": noisy, "clean": clean}) == pytest.approx(5, abs=0.01)


def test_noise_is_the_file_from_somewhere_on_and_again(stand_in):
    parts, folder = stand_in
    starts = set()
    for example in (e for examples in parts.values() for e in examples):
        _, noise = parts_of(example)
        samples, rate = soundfile.read(folder / "noises" / example["noise"].decode())
        whole = scipy.signal.resample_poly(samples - samples.mean(), 320, 441)
        assert rate * 320 / 441 == len(whole) == 8000
        # Where it is: the best correlation with the file, which is repeated without an end.
        ring = np.fft.irfft(np.fft.rfft(noise, 8000) * np.conj(np.fft.rfft(whole)))
        start = -ring.argmax() % 8000
        expected = np.roll(whole, -start)[: len(noise)]
        inside = np.abs((np.arange(len(noise)) + start + 200) % 8000 - 200) > 200  # filters differ at the file's ends
        ratio = np.sum(noise * expected) / np.sum(expected**2)
        assert np.abs(noise - ratio * expected)[inside].max() < 0.02 * np.abs(noise).max() + 1
        starts.add(start)
    assert len(starts) > 40


def test_clean_is_the_speech(stand_in):
    parts, folder = stand_in
    for example in (e for examples in parts.values() for e in examples):
        level, name, _ = example["id"].decode().split("/")
        samples, _ = soundfile.read(folder / "sound" / level / "nl" / f"{name}.ogg")
        expected = scipy.signal.resample_poly(samples[:, 0], 160, 441) * 32768
        clean, _ = parts_of(example)
        assert len(clean) == 2000
        scale = np.abs(clean).max() / np.abs(expected[: len(clean)]).max()
        assert scale <= 1.01
        np.testing.assert_allclose(clean[200:-200], scale * expected[200:1800], atol=300)


def test_noise_is_made_louder_than_full_scale_but_nothing_is_cut_off(stand_in):
    # Speech has a peak of a half, and in five times its energy the noise a higher one than full scale.
    loudest = [np.abs(e["noisy"].astype(int)).max() for e in stand_in[0]["test"] if e["snr"] == -5]
    assert max(loudest) in (32765, 32766, 32767)
    for example in stand_in[0]["test"]:
        assert (np.abs(example["noisy"].astype(int)) >= 32765).sum() <= 2


def test_splits_share_nothing(stand_in):
    parts, _ = stand_in
    assert_disjoint(parts, "level", "noise")
    used = {split: {e["noise"].decode() for e in examples} for split, examples in parts.items()}
    assert len(set().union(*used.values())) == 12
    assert {split: len(names) for split, names in used.items()} == {"train": 8, "validation": 2, "test": 2}
    for names in used.values():
        assert {name.replace("2", "1") for name in names} == {name for name in names if "1" in name}  # both of a word


def test_it_is_the_same_again(stand_in, tmp_path):
    parts, folder = stand_in
    again = prepare(folder, tmp_path)
    for split, examples in parts.items():
        for one, other in zip(examples, again[split], strict=True):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[key], other[key]) for key in one)


def test_clicks_and_copies_are_left_out(tmp_path):
    write_stand_in(tmp_path)
    fakes.write_sound(tmp_path / "noises/Click.wav", 0.1 * np.ones(5000), 11025)  # below half a second
    shutil.copy(tmp_path / "noises/Farm1.wav", tmp_path / "noises/Water9.wav")
    noises = fillets_noisy._read_noises(tmp_path / "noises", 8000)
    assert sorted(noises) == [f"{name}.wav" for name in NOISES]


def test_silent_parts_are_not_taken():
    noise = np.zeros(8000)
    noise[7900:] = np.random.default_rng(0).normal(size=100)
    for seed in range(100):
        part = fillets_noisy._part(np.random.default_rng(seed), noise, 2000)
        assert np.mean(part**2) >= 0.1 * np.mean(noise**2)


@pytest.mark.parametrize("length", [1, 5, 10, 11, 23])
def test_short_noises_are_repeated(length):
    noise = np.arange(1.0, 11.0)
    part = fillets_noisy._part(np.random.default_rng(length), noise, length)
    expected = [part[0]]
    while len(expected) < length:
        expected.append(expected[-1] % 10 + 1)  # 1 follows 10
    np.testing.assert_array_equal(part, expected)


def test_damaged_and_missing_noises_are_told(tmp_path):
    write_stand_in(tmp_path)
    (tmp_path / "noises/Mill1.wav").write_bytes(b"RIFF")
    with pytest.raises(DatasetError, match=r"Mill1\.wav: .*; remove the folder and fetch again"):
        prepare(tmp_path, tmp_path / "data")
    shutil.rmtree(tmp_path / "noises")
    with pytest.raises(DatasetError, match="no noise for train; remove the folder and fetch again"):
        prepare(tmp_path, tmp_path / "data")


@pytest.mark.slow
@pytest.mark.soak  # what the apps' tests fetch is this set
def test_real_packages(tmp_path):
    if shutil.which("apt-get") is None:
        pytest.skip("this machine has no apt-get")
    lines = []
    parts = read(datasets.prepare("fillets_noisy", str(tmp_path), lines.append))
    assert "fetching fillets_noisy from packages, 148 MB" in lines
    assert {split: len(part) for split, part in parts.items()} == {"train": 1289, "validation": 708, "test": 572}
    assert_disjoint(parts, "level", "noise")
    assert Counter(float(e["snr"]) for e in parts["test"]) == {-5.0: 143, 0.0: 143, 5.0: 143, 10.0: 143}
    for example in (e for examples in parts.values() for e in examples):
        assert decibels(example) == pytest.approx(float(example["snr"]), abs=0.02)
    (tmp_path / "nowhere").mkdir()
    fillets_noisy.fetch(tmp_path / "downloads/manual/fillets_noisy", tmp_path / "nowhere")
    assert list((tmp_path / "nowhere").iterdir()) == []
