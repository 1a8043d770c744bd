"""Draw docs/step.svg: one training step, with the code's own names, so that a rename shows up.

    python docs/make_step_svg.py

tests/test_docs.py compares the file with what this script draws.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from mpillm.comm.channels.channel_set import ChannelSet
from mpillm.comm.communicator import Communicator
from mpillm.models.part_module import PartModule
from mpillm.parallel.data.replicated import ReplicatedGradients
from mpillm.parallel.grad_norm import clip_gradients_
from mpillm.parallel.pipeline.executor import Pipeline
from mpillm.parallel.pipeline.stage import ModelStage
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.tasks.causal_lm import CausalLM
from mpillm.tasks.task import Task
from mpillm.tokens.sampler import Sampler
from mpillm.train.lr_schedule import learning_rate
from mpillm.train.optimizers.adamw import AdamWSettings
from mpillm.train.step import StepResult, Trainer

FILE = Path(__file__).with_name("step.svg")
WIDTH, HEIGHT = 1120, 640
# Left edges and width of the four columns, in px.
COLUMNS, COLUMN_WIDTH = (24, 302, 580, 858), 238

# Both palettes have a contrast of at least 4.5 : 1 between text and its ground.
STYLE = """
  .ground { fill: #ffffff } .replica { fill: #f4f6f8; stroke: #c9d1d9 }
  .box { fill: #ffffff; stroke: #57606a } .rank { fill: #ddf4ff; stroke: #0969da }
  text { fill: #1f2328; font: 12.5px system-ui, sans-serif }
  .title { font-size: 19px; font-weight: 600 } .head { font-size: 15px; font-weight: 600 }
  .name { font: 600 13px ui-monospace, "DejaVu Sans Mono", monospace }
  .module { fill: #57606a; font: 11px ui-monospace, "DejaVu Sans Mono", monospace }
  .flow { fill: none; stroke: #0969da; stroke-width: 1.6 } .tip { fill: #0969da }
  .label { fill: #0550ae; font-size: 12px }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117 } .replica { fill: #161b22; stroke: #30363d }
    .box { fill: #0d1117; stroke: #8b949e } .rank { fill: #0c2d6b; stroke: #58a6ff }
    text { fill: #e6edf3 } .module { fill: #9da7b3 }
    .flow { stroke: #58a6ff } .tip { fill: #58a6ff } .label { fill: #79c0ff }
  }
"""


def name_of(thing: Any) -> str:
    """Return a class's, a function's or a method's own name, the latter with its class."""
    return str(thing.__qualname__)


def module_of(thing: Any) -> str:
    """Return the file of a class or function, without the package's name."""
    return str(thing.__module__).removeprefix("mpillm.").replace(".", "/") + ".py"


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Write one line, its baseline at `y`."""
    mark = f' class="{kind}"' if kind else ""
    return f'  <text x="{x:g}" y="{y:g}"{mark} text-anchor="{anchor}">{escape(words)}</text>'


def box(column: int, y: float, things: Sequence[Any], lines: Sequence[str], kind: str) -> str:
    """Draw a box: the names of `things`, the file of the first, and what they do."""
    x = COLUMNS[column]
    names = [text(x + 12, y + 22 + 17 * n, name_of(each), "name") for n, each in enumerate(things)]
    below = y + 22 + 17 * len(things)
    module = text(x + 12, below - 1, module_of(things[0]), "module")
    words = [text(x + 12, below + 19 + 17 * n, line) for n, line in enumerate(lines)]
    height = below + 19 + 17 * len(lines) - y - 6
    frame = (
        f'  <rect class="{kind}" x="{x}" y="{y:g}" width="{COLUMN_WIDTH}" height="{height:g}" '
        'rx="6"/>'
    )
    return "\n".join([frame, *names, module, *words])


def arrow(*points: tuple[float, float], both: bool = False) -> str:
    """Draw a line through `points` with a tip at its end, or at both ends."""
    path = " L ".join(f"{x:g} {y:g}" for x, y in points)
    start = ' marker-start="url(#tip)"' if both else ""
    return f'  <path class="flow" d="M {path}" marker-end="url(#tip)"{start}/>'


def draw() -> str:
    """Return the picture as the text of an SVG file."""
    read, compute, reduce, update = COLUMNS
    middle, gutter = compute + COLUMN_WIDTH / 2, reduce - 18
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="One training step, from tokens to updated weights">',
        f"  <style>{STYLE}  </style>",
        '  <marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path class="tip" d="M 0 0 L 8 4 L 0 8 z"/></marker>',
        f'  <rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>',
        text(24, 34, f"One training step: {name_of(Trainer.step)}", "title"),
        text(
            24,
            57,
            "Four ranks, data = 2 × pipeline = 2. Every name is the code's own, its file below it.",
        ),
        f'  <rect class="replica" x="12" y="74" width="{WIDTH - 24}" height="466" rx="10"/>',
        *(
            text(x + 12, 101, words, "head")
            for x, words in zip(
                COLUMNS, ("1  read", "2  compute", "3  reduce", "4  update"), strict=True
            )
        ),
        box(
            0,
            116,
            [Sampler.windows],
            ["reads this replica's rows; the order", "is a function of (seed, step)"],
            "box",
        ),
        text(read + 24, 226, "tokens (B, T + 1)", "label"),
        arrow((read + 12, 204), (read + 12, 240)),
        box(
            0,
            244,
            [CausalLM.fields],
            ["makes the fields of the batch:", "ids and targets, by microbatch"],
            "box",
        ),
        box(
            1,
            116,
            [Pipeline.run],
            ["runs the rank's row of a schedule,", "F and B of each microbatch"],
            "box",
        ),
        arrow((read + COLUMN_WIDTH, 272), (compute - 2, 272)),
        text(compute - 10, 264, "ids", "label", "end"),
        box(
            1,
            226,
            [ModelStage.forward, ModelStage.backward],
            [f"rank 0, stage 0: a {name_of(PartModule)}", "with the first half of the blocks"],
            "rank",
        ),
        arrow((compute + 14, 332), (compute + 14, 396)),
        arrow((compute + COLUMN_WIDTH - 14, 400), (compute + COLUMN_WIDTH - 14, 334)),
        text(middle, 356, "streams ↓   gradients ↑", "label", "middle"),
        text(middle, 373, name_of(ChannelSet), "name", "middle"),
        text(middle, 388, module_of(ChannelSet), "module", "middle"),
        box(
            1,
            400,
            [ModelStage.forward, Task.objective_sum],
            ["rank 1, stage 1: the other half,", "then the loss of the targets"],
            "rank",
        ),
        arrow((read + 60, 332), (read + 60, 452), (compute - 2, 452)),
        text(compute - 12, 444, "targets", "label", "end"),
        box(
            2,
            116,
            [ReplicatedGradients.ready],
            ["takes each gradient from autograd", "and lays it into a bucket"],
            "box",
        ),
        arrow((compute + COLUMN_WIDTH, 258), (gutter, 258), (gutter, 150), (reduce - 2, 150)),
        box(
            2,
            244,
            [Communicator.allreduce],
            ["sums buckets over the data axis,", "after the backward pass, or in it"],
            "box",
        ),
        arrow((reduce + 60, 204), (reduce + 60, 240)),
        text(reduce + 72, 226, "full buckets", "label"),
        box(
            2,
            372,
            [clip_gradients_],
            ["scales them by the norm of the", "whole model, from all ranks"],
            "box",
        ),
        arrow((reduce + 60, 332), (reduce + 60, 368)),
        text(reduce + 72, 354, "summed gradients", "label"),
        box(
            3,
            116,
            [learning_rate],
            ["gives the rate of this step"],
            "box",
        ),
        box(
            3,
            227,
            [AdamWSettings.build],
            ["made the optimizer at the start;", "its step updates the weights"],
            "box",
        ),
        arrow((update + 60, 187), (update + 60, 223)),
        arrow(
            (reduce + COLUMN_WIDTH, 416),
            (update - 12, 416),
            (update - 12, 268),
            (update - 2, 268),
        ),
        box(
            3,
            372,
            [StepResult],
            ["loss, norm, rate and times, for the", "metrics, the trace and the report"],
            "box",
        ),
        arrow((update + 60, 315), (update + 60, 368)),
        text(
            24,
            528,
            f"{name_of(ShardedModel)} joins 2 and 3 on each rank ({module_of(ShardedModel)})",
            "",
        ),
        f'  <rect class="replica" x="12" y="566" width="{WIDTH - 24}" height="58" rx="10"/>',
        text(
            24,
            600,
            "Ranks 2 and 3: the other replica does the same with its own rows of the batch",
        ),
        arrow((reduce - 2, 300), (gutter, 300), (gutter, 564), both=True),
        text(gutter + 10, 558, "buckets, over the data axis", "label"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
