import os
import struct
import wave
from pathlib import Path

import numpy as np
import pytest

from mpillm.errors import DataError
from mpillm.tokens.pairs.sound import (
    BLOCK_FRAMES,
    HOP,
    log_mel,
    quiet_level,
    read_wav,
    resample,
    sound_frames,
)

CHANCE = np.random.default_rng(2)


def write(path: Path, samples: np.ndarray, rate: int, width: int = 2, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize("seconds", [0.007, 0.9, 3.0])
def test_frames_are_whispers(seconds: float) -> None:
    transformers = pytest.importorskip("transformers")
    samples = tone(16_000, seconds) + 0.1 * CHANCE.normal(size=round(16_000 * seconds))
    extractor = transformers.WhisperFeatureExtractor()
    [expected] = extractor(samples, sampling_rate=16_000, return_tensors="np").input_features
    frames = log_mel(samples)
    padded = np.full((3000, 80), quiet_level(frames), np.float32)
    padded[: len(frames)] = frames
    # The one or two frames after the sound still hear its end.
    after = slice(len(frames), len(frames) + 2)
    padded[after] = expected.T[after]
    np.testing.assert_allclose(padded, expected.T, atol=1e-4)


def test_a_frame_is_a_plain_fourier_transform() -> None:
    samples = CHANCE.normal(size=4000)
    frame = log_mel(samples)[7]
    part = samples[7 * 160 - 200 : 7 * 160 + 200]
    angles = -2j * np.pi * np.outer(np.arange(201), np.arange(400)) / 400
    window = np.sin(np.pi * np.arange(400) / 400) ** 2
    power = np.abs(np.exp(angles) @ (part * window)) ** 2
    # A mel below 1 kHz is 66.7 Hz wide, a bin 40 Hz: the filter of mel 10 by hand.
    scale = np.linspace(0, 15 + np.log(8) / (np.log(6.4) / 27), 82)[10:13] * 200 / 3
    bins = np.arange(201) * 40.0
    rise, fall = (
        (bins - scale[0]) / (scale[1] - scale[0]),
        (scale[2] - bins) / (scale[2] - scale[1]),
    )
    weights = np.clip(np.minimum(rise, fall), 0, None) * 2 / (scale[2] - scale[0])
    assert frame[10] == pytest.approx((np.log10(power @ weights) + 4) / 4, abs=1e-5)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_each_width_of_samples_is_read(tmp_path: Path, width: int) -> None:
    expected = tone(8000, 0.1)
    if width == 1:
        data = np.round(expected * 127 + 128).astype(np.uint8)
    else:
        whole = np.round(expected * (2 ** (8 * width - 1) - 1)).astype("<i4")
        data = whole.view(np.uint8).reshape(-1, 4)[:, :width]
    samples, rate = read_wav(write(tmp_path / "a.wav", data, 8000, width))
    assert rate == 8000
    np.testing.assert_allclose(samples, expected, atol=2.0 ** (2 - 8 * width))


def test_channels_are_averaged_and_rates_changed(tmp_path: Path) -> None:
    both = np.stack([tone(8000), 0 * tone(8000)], 1)
    path = write(tmp_path / "a.wav", np.round(both * 32767).astype("<i2"), 8000, channels=2)
    samples = resample(*read_wav(path))
    assert len(samples) == 16_000
    np.testing.assert_allclose(samples, tone(16_000) / 2, atol=1e-3)
    assert len(resample(tone(44_100), 44_100)) == 16_000
    frames = sound_frames(path)
    assert (frames.shape, frames.dtype) == ((100, 80), np.float16)
    # But for the edges, the tone is where it is in all frames.
    assert set(frames[2:-2].argmax(1).tolist()) == {11}


def test_what_is_no_sound_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"ID3 not a wave file at all")
    with pytest.raises(DataError, match=r"a.wav is no WAV file .*ffmpeg"):
        read_wav(tmp_path / "a.wav")
    with pytest.raises(DataError, match=r"cannot read the sound .*b.wav"):
        read_wav(tmp_path / "b.wav")
    with pytest.raises(DataError, match="has no sample"):
        read_wav(write(tmp_path / "c.wav", np.empty(0, "<i2"), 8000))


def test_odd_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(DataError, match="a pipe or a device"):
        read_wav(tmp_path / "pipe.wav")
    whole = write(tmp_path / "a.wav", np.ones(1 << 16, "<i2"), 8000).read_bytes()

    def changed(place: int, form: str, value: int) -> Path:
        data = bytearray(whole)
        struct.pack_into(form, data, place, value)
        (tmp_path / "b c.wav").write_bytes(data)
        return tmp_path / "b c.wav"

    with pytest.raises(DataError, match=r"40 bits; convert it by `ffmpeg -i '/.*b c.wav' .*`"):
        read_wav(changed(34, "<H", 40))
    # A second of it would be a gigabyte at 16 kHz.
    with pytest.raises(DataError, match=r"channels at 1 Hz; .* are allowed"):
        read_wav(changed(24, "<I", 1))
    # A chunk beyond the end of the file.
    with pytest.raises(DataError, match="no WAV file of PCM"):
        read_wav(changed(16, "<I", (1 << 32) - 2))
    # Of a stream, whose end was not known when its head was written.
    assert len(read_wav(changed(40, "<I", (1 << 32) - 1))[0]) == 1 << 16


def test_long_sounds_are_transformed_in_blocks() -> None:
    samples = 0.1 * CHANCE.normal(size=HOP * (BLOCK_FRAMES + 3))
    frames, end = log_mel(samples), log_mel(samples[HOP * (BLOCK_FRAMES - 3) :])
    np.testing.assert_array_equal(frames[-4:], end[-4:])


def test_silence_is_a_level() -> None:
    frames = log_mel(np.zeros(1600))
    assert frames == pytest.approx(-1.5)
    assert quiet_level(frames) == -1.5
