"""`fillets_noisy`: Dutch speech in noise, and without it, out of Debian's fillets-ng-data-nl and lincity-ng-data.

Mixed, not recorded in noise. `clean` is the speech of `fillets_nl`, with that data set's splits, `noisy` - `clean` is a
noise: sounds of the places of the game LinCity-NG (a mill, a harbour, a crowd, traffic), most of them 11 kHz and four
seconds long. All is mono, 8 kHz, int16.

Noises: of 141 WAV files, five clicks of less than half a second are left out, and three files that hold the same as
another one; the mean of each is taken away, some have an offset larger than their sound. Files whose names begin with
the same word (`ResidentialLow1`, `ResidentialMed2`) stay together; a fifth of the files tests, a fifth validates, which
is decided by the word's sha256. So levels, sentences and noises are in one split each; the two voices are in all.

A mixture: a noise drawn from the split's, from a drawn place on; at its end it begins again, without a fade. (A place
is drawn anew when the part has less than a tenth of the noise's power: some noises have long pauses.) The noise is made
as loud as `snr` says: the energy of `clean` over that of the noise, each over the whole clip, pauses included. Where
the mixture is louder than full scale, `clean` and noise are made quieter together, which four of five are. To train, a
clip is mixed once, at a ratio drawn from -5, 0, 5, 10 and 15 dB; to validate and to test at each of -5, 0, 5 and 10 dB,
each time with another draw. What is drawn is decided by the example's id: it is the same everywhere with the same
numpy, and the same but for roundings with another libsndfile or soxr.

             clips  mixtures  minutes  noises
train        1,289     1,289     75.6      81
validation     177       708     43.5      26
test           143       572     36.6      26

Source: Fish Fillets - Next Generation, https://fillets.sourceforge.net; LinCity-NG, https://github.com/lincity-ng
"""

import hashlib
import re
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from tfhalf.datasets import fillets, packages, sounds

_LANGUAGE = "nl"
_NOISES_PACKAGE, _NOISES_PATH = "lincity-ng-data", "usr/share/games/lincity-ng/sounds"
_NOISES = "noises"
_NOISES_SHA256 = "1b25192f705fbe2172b2410a615d12a7f9323c6ea82c5f35a0edf292aeb56fac"
_TRAINED_SNRS = (-5, 0, 5, 10, 15)
_TESTED_SNRS = (-5, 0, 5, 10)
_ONE_IN = 5  # of the noises validates, and as many test
_MIN_NOISE_SECONDS = 0.5
_MIN_POWER = 0.1  # of a noise's part, compared with the whole noise
_LOUDEST = np.iinfo(np.int16).max - 1  # speech and noise are rounded one by one: together that may add one


class FilletsNoisy(tfds.core.GeneratorBasedBuilder):
    """TFDS builder: 1,289 mixtures to train; 177 clips to validate and 143 to test, each at four ratios."""

    name = "fillets_noisy"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Run: python -m apps.data --dataset=fillets_noisy (takes sounds from Debian's packages fillets-ng-data-"
        f"{_LANGUAGE} and {_NOISES_PACKAGE}; needs apt-get)."
    )
    sampling_rate = 8000

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "Mixed, not recorded: Dutch speech of fillets_nl and noises of the game LinCity-NG, at stated "
                "signal-to-noise ratios. No level, sentence or noise is in two splits. Licences: speech GPL-2, noises "
                "GPL-2 or later."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "noisy": sounds.feature(self.sampling_rate, doc="Of the length of clean."),
                    "clean": sounds.feature(self.sampling_rate),
                    "snr": tfds.features.Scalar(
                        np.float32, doc="Energy of clean over energy of noisy - clean, over the whole clip, in dB."
                    ),
                    "noise": tfds.features.Text(doc="File that the noise is from."),
                    "id": tfds.features.Text(doc="Like airplane/let-m-divna/-5dB."),
                    "level": tfds.features.Text(),
                }
            ),
            supervised_keys=("noisy", "clean"),
            homepage="https://fillets.sourceforge.net",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        folder = Path(dl_manager.manual_dir)
        noises = _read_noises(folder / _NOISES, self.sampling_rate)
        split_of = fillets.split_names(noises, lambda name: re.match("[A-Z]?[a-z]*", name)[0], _ONE_IN)
        generators = {}
        for split, clips in fillets.split_clips(folder, _LANGUAGE).items():
            of_split = {name: noise for name, noise in noises.items() if split_of[name] == split}
            if not of_split:
                raise packages.DatasetError(f"{folder}: no noise for {split}; remove the folder and fetch again")
            generators[split] = self._generate_examples(clips, of_split, split == "train")
        return generators

    def _generate_examples(self, clips: list[fillets.Clip], noises: dict[str, np.ndarray], is_training: bool):
        names = list(noises)
        for clip in clips:
            speech = sounds.read(clip.path, self.sampling_rate)
            if not len(speech):
                continue
            for snr in [_random(clip.id).choice(_TRAINED_SNRS)] if is_training else _TESTED_SNRS:
                identity = f"{clip.id}/{snr}dB"
                random = _random(identity)
                name = names[random.integers(len(names))]
                noisy, clean = _mix(speech, _part(random, noises[name], len(speech)), snr)
                yield (
                    identity,
                    {
                        "noisy": sounds.encoded(noisy),
                        "clean": sounds.encoded(clean),
                        "snr": np.float32(snr),
                        "noise": name,
                        "id": identity,
                        "level": clip.level,
                    },
                )


def fetch(manual_dir: Path, scratch: Path) -> None:
    """Puts speech and noises into `manual_dir`, unless they are there already and are the right ones."""
    fillets.fetch(_LANGUAGE, manual_dir, scratch)
    target = manual_dir / _NOISES
    if packages.sha256_of_folder(target) == _NOISES_SHA256:
        return
    room = scratch / _NOISES_PACKAGE
    room.mkdir()
    source = packages.fetch_deb(_NOISES_PACKAGE, room, only=[_NOISES_PATH]) / _NOISES_PATH
    packages.keep(sorted(path.name for path in source.glob("*.wav")), source, target, _NOISES_SHA256)


def _random(identity: str) -> np.random.Generator:
    return np.random.default_rng(list(hashlib.sha256(identity.encode()).digest()))


def _read_noises(folder: Path, sampling_rate: int) -> dict[str, np.ndarray]:
    """Reads the noises that are used: name to float64 [num_samples] with a mean of 0."""
    noises, seen = {}, set()
    for path in sorted(folder.glob("*.wav")):
        samples = sounds.read(path, sampling_rate)
        if len(samples) >= _MIN_NOISE_SECONDS * sampling_rate and samples.tobytes() not in seen:
            seen.add(samples.tobytes())
            noises[path.name] = samples - samples.mean()
    return noises


def _part(random: np.random.Generator, noise: np.ndarray, length: int) -> np.ndarray:
    """Returns a part of a noise from anywhere in it; behind its end it begins again."""
    while True:
        start = random.integers(len(noise))
        part = noise[np.arange(start, start + length) % len(noise)]
        # Parts have the noise's power on average, so there is one that isn't silent.
        if np.mean(part**2) >= _MIN_POWER * np.mean(noise**2):
            return part


def _mix(speech: np.ndarray, noise: np.ndarray, snr: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns noisy and clean speech, int16; where the sum is too loud for it, both are made quieter."""
    clean = speech.astype(np.float64)
    noise = noise * np.sqrt(np.sum(clean**2) / np.sum(noise**2) / 10 ** (snr / 10))
    peak = max(np.abs(clean).max(), np.abs(clean + noise).max(), _LOUDEST)
    clean, noise = (np.rint(samples * (_LOUDEST / peak)) for samples in (clean, noise))
    return (clean + noise).astype(np.int16), clean.astype(np.int16)
