"""Sound files: read as float32 in mono at the rate that is asked for, written as WAV.

libsndfile reads the files (by soundfile), soxr changes the rate. A file is read in blocks: in memory are what comes out
and one block, however many channels and whatever rate the file has. Neither Keras nor TensorFlow is needed.

A file that was cut off is refused, where it tells: FLAC always, OGG by its last page, WAV by its header unless that was
written before the length was known; MP3 never. Damage in the middle is told by FLAC only.
"""

import io
import os
import re
from pathlib import Path

import numpy as np
import soundfile
import soxr

_BLOCK = 1 << 16
# A program that writes WAV into a pipe doesn't know the length, and promises about 2^31 or 2^32 bytes.
_UNKNOWN = (1 << 31) - (1 << 16)
# RFC 3533, section 6: the longest page, where in it are flags and the number of segments, the flag of the last page.
_PAGE, _FLAGS, _SEGMENTS, _LAST = 65_307, 5, 26, 4


class WaveformError(ValueError):
    """A file that isn't sound, or not all of it; the message names it."""


def read(source: str | os.PathLike | bytes, sampling_rate: int) -> np.ndarray:
    """Returns a sound in mono.

    Channels are averaged. A sample beyond -1 to 1 stays as it is: a file of floats may hold some, and a change of rate
    makes some of clipped sound.

    Args:
        source: a file, or what is in one: WAV, FLAC, OGG and what else libsndfile reads.
        sampling_rate: samples a second of the result.

    Returns:
        float32 `[samples]`, round(duration * sampling_rate), 1 or more.

    Raises:
        WaveformError: there is no such file, it isn't sound, holds none, was cut off, or a sample isn't finite.
    """
    name = "sound in memory" if isinstance(source, bytes) else os.fspath(source)
    if not isinstance(source, bytes):
        try:
            # libsndfile says "System error" only.
            with open(source, "rb") as file:
                is_empty = not file.read(1)
        except OSError as error:
            raise WaveformError(f"can't read {name}: {error.strerror}") from error
    else:
        is_empty = not source
    if is_empty:
        raise WaveformError(f"{name} is empty: make it again")
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else name) as file:
            rate, cut_off = file.samplerate, _is_cut_off(file, source)
            blocks = [np.zeros(0, "float32")]
            resampler = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32")
            count = 0
            for block in file.blocks(_BLOCK, dtype="float32", always_2d=True):
                count += len(block)
                blocks.append(resampler.resample_chunk(block.mean(axis=1)))
            blocks.append(resampler.resample_chunk(np.zeros(0, "float32"), last=True))
    except soundfile.LibsndfileError as error:
        raise WaveformError(
            f"{name} is no whole WAV, FLAC or OGG file ({error.error_string.strip(' .')}): make it again, or convert "
            "it by ffmpeg -i FILE new.wav"
        ) from error
    if cut_off:
        raise WaveformError(f"{name} was cut off after {count / rate:.3f} seconds: copy it or make it again")
    result = np.concatenate(blocks)
    if not count or not len(result):
        raise WaveformError(f"{name} holds no sound ({count} samples at {rate} Hz): record it again")
    if not np.isfinite(result).all():
        raise WaveformError(f"{name} holds samples that aren't finite: make it again")
    return result


def write(path: str | os.PathLike, waveform: np.ndarray, sampling_rate: int) -> None:
    """Writes a WAV file of 16 bits, in mono; a file that was there is replaced at once or not at all.

    Args:
        path: the file; its folder exists.
        waveform: float `[samples]`; what is beyond -1 to 1 is clipped.
        sampling_rate: samples a second.

    Raises:
        ValueError: the waveform has another shape, or a sample isn't finite.
        OSError: it can't be written.
    """
    path, waveform = Path(path), np.asarray(waveform)
    if waveform.ndim != 1 or not np.isfinite(waveform).all():
        raise ValueError(f"{path}: a waveform is [samples] of finite numbers, not {waveform.dtype}{waveform.shape}")
    # In memory first: libsndfile's callbacks into Python lose the error of a full disk.
    encoded = to_wav(waveform, sampling_rate)
    beside = path.with_name(f".{path.name}")
    try:
        with open(beside, "wb") as file:
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the rename itself
    finally:
        os.close(descriptor)


def to_wav(waveform: np.ndarray, sampling_rate: int) -> bytes:
    """Returns what `write` writes, of a waveform whose samples are finite."""
    encoded = io.BytesIO()
    soundfile.write(encoded, waveform, sampling_rate, format="WAV", subtype="PCM_16")
    return encoded.getvalue()


def _is_cut_off(file: soundfile.SoundFile, source: str | os.PathLike | bytes) -> bool:
    """Says whether a file that libsndfile reads to its end has no end; FLAC is told while it is read."""
    if file.format == "OGG":
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as raw:
            raw.seek(max(0, raw.seek(0, os.SEEK_END) - 2 * _PAGE))
            tail = raw.read()
        page = tail[tail.rfind(b"OggS") :]
        if len(page) <= _SEGMENTS or not page[_FLAGS] & _LAST:
            return True
        table = page[_SEGMENTS + 1 :][: page[_SEGMENTS]]
        return len(page) < _SEGMENTS + 1 + page[_SEGMENTS] + sum(table)
    # libsndfile's log of a WAV file: what the header promises, and what is there.
    found = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    return bool(found) and int(found[2]) < int(found[1]) < _UNKNOWN
