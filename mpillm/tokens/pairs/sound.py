"""Sound to log-mel frames, as Whisper reads them (Radford et al. 2022): 100 frames of 80 mels a
second.
"""

import os
import sys
import wave
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.errors import DataError
from mpillm.system.messages import command, explain
from mpillm.system.plain_files import open_plain

Array = np.ndarray[Any, np.dtype[Any]]
SAMPLE_RATE, FFT, HOP, MELS = 16_000, 400, 160, 80
# Bytes of a sample.
WIDEST = 4
# Whisper's: quieter than 10^-10 is silence, and than 10^-8 of the loudest too.
SILENCE, RANGE = -10.0, 8.0
# Whisper scales logarithms to about -1 … 1.
OFFSET, SCALE = 4.0, 4.0
# How ffmpeg writes what is read here.
AS_PCM = f"-ac 1 -ar {SAMPLE_RATE} -c:a pcm_s16le OUT.wav".split()
# Of the file, and at 16 kHz: 4.6 hours.
LARGEST_SAMPLES = 1 << 28
# Frames that are transformed together: some 40 MB.
BLOCK_FRAMES = 4096


def read_wav(path: Path) -> tuple[Array, int]:
    """Read a WAV file of PCM: samples in [-1, 1], the mean of the channels, and their rate.

    Raises DataError.
    """
    try:
        with open_plain(path) as opened, wave.open(opened, "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            # A stream's head may declare any number.
            size = os.fstat(opened.fileno()).st_size
            count = min(file.getnframes(), size // max(1, width * channels))
            at_16_khz = count * SAMPLE_RATE // rate if rate else 0
            if max(count * channels, at_16_khz) > LARGEST_SAMPLES:
                raise DataError(
                    f"{path} has {count:,} samples of {channels:,} channels at {rate:,} Hz; "
                    f"{LARGEST_SAMPLES:,} are allowed, there and at {SAMPLE_RATE:,} Hz; cut it"
                )
            if width > WIDEST:
                raise wave.Error(f"samples of {8 * width} bits")
            data = file.readframes(count)
    except OSError as failure:
        raise DataError(f"cannot read the sound {explain(failure, path)}") from failure
    # RuntimeError: a chunk that is larger than its file.
    except (wave.Error, EOFError, RuntimeError) as failure:
        convert = command(["ffmpeg", "-i", str(path), *AS_PCM])
        raise DataError(
            f"{path} is no WAV file of PCM that can be read: {str(failure) or 'it is cut off'}; "
            f"convert it by `{convert}`"
        ) from failure
    # A file may end within a frame of samples.
    data = data[: len(data) - len(data) % (width * channels)] if rate and channels else b""
    if not data:
        raise DataError(f"{path} has no sample; leave its record out")
    return _samples(data, width).reshape(-1, channels).mean(1), rate


def _samples(data: bytes, width: int) -> Array:
    """Decode PCM of 1 to 4 bytes a sample to numbers in [-1, 1]."""
    raw = np.frombuffer(data, np.uint8)
    if width == 1:
        # The one width that is unsigned.
        return (raw.astype(np.float64) - 128) / 128
    wide = np.zeros((len(raw) // width, 4), np.uint8)
    wide[:, 4 - width :] = raw.reshape(-1, width)
    return wide.view("<i4")[:, 0] / float(1 << 31)


def resample(samples: Array, rate: int, wanted: int = SAMPLE_RATE) -> Array:
    """Change the rate by the Fourier transform of the whole: frequencies beyond are cut off."""
    if rate == wanted:
        return samples
    count = max(1, round(len(samples) * wanted / rate))
    spectrum = np.fft.rfft(samples)
    kept = np.zeros(count // 2 + 1, complex)
    both = min(len(spectrum), len(kept))
    kept[:both] = spectrum[:both]
    return np.asarray(np.fft.irfft(kept, count) * (count / len(samples)))


def log_mel(samples: Array) -> Array:
    """Compute the frames of samples at 16 kHz, float32 (frames, 80): one for each 10 ms begun."""
    frames = -(-len(samples) // HOP)
    # The sound begins as if mirrored, and ends in silence.
    start = np.pad(samples, (0, max(0, FFT // 2 + 1 - len(samples))))[FFT // 2 : 0 : -1]
    whole = np.concatenate((start, samples, np.zeros(FFT)))
    windows = np.lib.stride_tricks.sliding_window_view(whole, FFT)[::HOP][:frames]
    # Periodic, as of the short-time Fourier transform.
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT) / FFT)
    levels = np.empty((frames, MELS))
    for first in range(0, frames, BLOCK_FRAMES):
        block = slice(first, first + BLOCK_FRAMES)
        power = np.abs(np.fft.rfft(windows[block] * hann, axis=1)) ** 2
        levels[block] = np.log10(np.maximum(power @ mel_filters(), 10.0**SILENCE))
    levels = np.maximum(levels, levels.max() - RANGE)
    return np.asarray((levels + OFFSET) / SCALE, np.float32)


def quiet_level(frames: Array) -> float:
    """Return the value of silence after `frames`, by which short rows are padded."""
    loudest = float(frames.max()) if frames.size else -sys.float_info.max
    return max(loudest - RANGE / SCALE, (SILENCE + OFFSET) / SCALE)


@cache
def mel_filters() -> Array:
    """Make triangular filters on Slaney's mel scale, each of equal area: (201, 80).

    The scale is linear to 1 kHz and logarithmic above (Auditory Toolbox, Slaney 1998).
    """
    step, per_mel = np.log(6.4) / 27, 200 / 3
    top = 15 + np.log(SAMPLE_RATE / 2 / 1000) / step
    mels = np.linspace(0, top, MELS + 2)
    hertz = np.where(mels < 15, per_mel * mels, 1000 * np.exp(step * (mels - 15)))
    bins = np.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1)
    slopes = hertz[None] - bins[:, None]
    widths = np.diff(hertz)
    filters = np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:])
    return np.maximum(0, filters) * (2 / (hertz[2:] - hertz[:-2]))


def sound_frames(path: Path) -> Array:
    """Read a WAV file as log-mel frames, float16 (frames, 80). Raises DataError."""
    # Levels of about -1 to 1: half precision keeps them to 0.0005.
    return log_mel(resample(*read_wav(path))).astype("<f2")
