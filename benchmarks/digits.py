"""Train small models on real digits, written and spoken, and score them on what they never saw.

    python benchmarks/digits.py [--ranks 2 --only written --json FILE]
    MPILLM_SPOKEN_DIGITS=FOLDER python benchmarks/digits.py --only spoken [--speaker theo]

- written: a ViT on the 1,797 images of scikit-learn (`pip install scikit-learn`); a fifth of them,
  by the hash of each, is held out
- spoken: an encoder with CTC on the 3,000 recordings of the Free Spoken Digit Dataset, whose folder
  of WAV files the variable names; one of six speakers is held out. All are made equally loud, and
  each recording of the others becomes fifteen: at another speed, by another microphone, in noise,
  with a band of its frequencies and a stretch of its time masked

Either is left out where its data is missing. A spoken digit is written in letters: `zero`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
# The project's bars.
LEAST_ACCURACY, LARGEST_ERROR = 0.97, 0.10
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMMON = {"optimizer.warmup_steps": "100", "train.evaluate_every": "0", "train.save_every": "0"}
WRITTEN = {
    **COMMON,
    "model.shape": "vit-tiny-digits",
    "task.name": "image-classification",
    "optimizer.learning_rate": "1e-3",
    "train.batch": "64",
    "train.steps": "1200",
}
SPOKEN = {
    **COMMON,
    "model.shape": "sound-tiny",
    "model.context": "48",
    "model.width": "128",
    "model.dropout": "0.15",
    "task.name": "ctc",
    "optimizer.learning_rate": "2e-3",
    "train.batch": "32",
    "train.steps": "8000",
}
# Of five speakers' recordings, to stand for other voices: pitch and speed change together.
SPEEDS = (0.8, 0.9, 1.0, 1.1, 1.25)
# Copies at each speed.
DRAWS = 3
# Of 16-bit samples.
LOUDEST = 32000
# Deviation of a microphone's gains, in decibels; the most silence, in seconds; signal over noise.
MICROPHONES, SILENCE, NOISE = 6.0, 0.08, (8.0, 45.0)
# The largest masked share of the frequencies, and of the time (SpecAugment, Park et al. 2019).
BAND, STRETCH = 0.12, 0.12
# Two frames of 10 ms are a position.
LONGEST = 0.02 * int(SPOKEN["model.context"])
MPILLM = [sys.executable, "-m", "mpillm"]


def run(words: list[str]) -> str:
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare(records: list[dict[str, object]], task: str, out: Path, validation: float) -> Path:
    source = out.with_suffix(".jsonl")
    source.write_text("\n".join(map(json.dumps, records)))
    options = ["--task", task, "--validation", str(validation), "--tokenizer", "bytes"]
    run([*MPILLM, "prepare", str(source), "--out", str(out), *options])
    return out


def train(settings: dict[str, str], data: Path, ranks: int) -> tuple[Path, float]:
    """Train on `data`; return the run, and its seconds."""
    made = data.with_name(f"{data.name}-run")
    recipe = data.with_suffix(".toml")
    recipe.write_text(f'[data]\npath = "{data}"\n')
    settings = {**settings, "train.run": str(made)}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    begun = time.perf_counter()
    run(["mpirun", "-n", str(ranks), "--bind-to", "none", *MPILLM, "train", str(recipe), *words])
    return made, time.perf_counter() - begun


def score(made: Path, data: Path, metrics: str) -> dict[str, float]:
    words = ["--data", str(data), "--metrics", metrics, "--json"]
    found: dict[str, float] = json.loads(run([*MPILLM, "evaluate", str(made), *words]))["model"]
    return found


def written(folder: Path, ranks: int) -> dict[str, float] | None:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found]
    except ImportError:
        print("written digits: left out, `pip install scikit-learn` brings them")
        return None
    digits = load_digits()
    records = [
        {"image": (image / 16).tolist(), "label": int(label)}
        for image, label in zip(digits.images, digits.target, strict=True)
    ]
    data = prepare(records, "image-classification", folder / "written", 0.2)
    made, seconds = train(WRITTEN, data, ranks)
    found = score(made, data, "loss,accuracy,macro-f1")
    print(
        f"written digits: {found['accuracy']:.2%} of those held out in {seconds:.0f} s "
        f"(bar: {LEAST_ACCURACY:.0%})"
    )
    return found


def read(path: Path) -> tuple[Array, int]:
    """Read 16-bit samples in [-1, 1] and their rate."""
    with wave.open(str(path), "rb") as file:
        data = file.readframes(file.getnframes())
        return np.frombuffer(data, "<i2") / 32768, file.getframerate()


def write(path: Path, samples: Array, rate: float) -> None:
    """Write samples at the loudness of all: the speakers' peaks differ by a factor of 16."""
    samples = samples / max(1e-9, np.abs(samples).max())
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(round(rate))
        file.writeframes((samples * LOUDEST).astype("<i2").tobytes())


def curve(size: int, decibels: float, random: np.random.Generator) -> Array:
    """Draw the gains of a smooth filter, by frequency; `decibels`: their deviation."""
    points = random.normal(0, decibels, random.integers(3, 7))
    places = np.linspace(0, 1, len(points))
    return np.asarray(10 ** (np.interp(np.linspace(0, 1, size), places, points) / 20))


def masked(size: int, most: float, random: np.random.Generator) -> slice:
    """Draw a stretch of at most the share `most` of `size`."""
    width = int(size * random.uniform(0, most))
    begin = random.integers(0, size - width)
    return slice(begin, begin + width)


def vary(samples: Array, rate: int, random: np.random.Generator) -> Array:
    """Draw another microphone, silence before and after, and noise."""
    spectrum = np.fft.rfft(samples)
    spectrum = spectrum * curve(len(spectrum), MICROPHONES, random)
    spectrum[masked(len(spectrum), BAND, random)] *= 0.03
    heard = np.fft.irfft(spectrum, len(samples))
    heard[masked(len(heard), STRETCH, random)] *= 0.03
    before, after = (random.uniform(0, SILENCE, 2) * rate).astype(int)
    heard = np.pad(heard, (before, after))
    noise = np.fft.rfft(random.normal(size=len(heard)))
    # Between white noise and pink noise.
    color = (np.arange(len(noise)) / len(noise) + 0.02) ** -random.uniform(0, 1)
    noise = np.fft.irfft(noise * color * curve(len(noise), MICROPHONES / 2, random), len(heard))
    ratio = 10 ** (-random.uniform(*NOISE) / 20)
    return np.asarray(heard + noise * ratio * heard.std() / noise.std())


def spoken(folder: Path, ranks: int, speaker: str) -> dict[str, float] | None:
    place = os.environ.get("MPILLM_SPOKEN_DIGITS")
    if not place:
        print("spoken digits: left out, MPILLM_SPOKEN_DIGITS names the folder of its WAV files")
        return None
    known: list[dict[str, object]] = []
    unseen: list[dict[str, object]] = []
    random = np.random.default_rng(0)
    for path in sorted(Path(place).resolve().glob("*_*_*.wav")):
        digit, who, _ = path.stem.split("_")
        word = WORDS[int(digit)]
        samples, rate = read(path)
        if who == speaker:
            copy = folder / path.name
            write(copy, samples, rate)
            unseen.append({"audio": str(copy), "text": word})
            continue
        for number, factor in enumerate(SPEEDS * DRAWS):
            copy = folder / f"{path.stem}-{number}.wav"
            varied = vary(samples, rate, random)
            # A longer one would lose its end, and keep its whole text.
            if len(varied) / (factor * rate) <= LONGEST:
                write(copy, varied, factor * rate)
                known.append({"audio": str(copy), "text": word})
    data = prepare(known, "ctc", folder / "known", 0.02)
    # A split has one pair at least: nearly all are for validation.
    other = prepare(unseen, "ctc", folder / "unseen", 0.99)
    made, seconds = train(SPOKEN, data, ranks)
    found = score(made, other, "loss,word-error-rate,token-error-rate")
    print(
        f"spoken digits of {speaker}, never heard: word error {found['word_error_rate']:.2%} "
        f"after {seconds:.0f} s of {len(known):,} recordings of others (bar: {LARGEST_ERROR:.0%})"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", choices=("written", "spoken"))
    parser.add_argument("--speaker", default="theo")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, dict[str, float] | None] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if given.only != "spoken":
            found["written"] = written(folder, given.ranks)
        if given.only != "written":
            found["spoken"] = spoken(folder, given.ranks, given.speaker)
    if given.json:
        given.json.write_text(json.dumps(found) + "\n")
    first, second = found.get("written"), found.get("spoken")
    if first and first["accuracy"] < LEAST_ACCURACY:
        sys.exit(1)
    if second and second["word_error_rate"] > LARGEST_ERROR:
        sys.exit(1)


if __name__ == "__main__":
    main()
