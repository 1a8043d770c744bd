"""Compare training steps on one rank with its peers: CPU time on one thread, in float32.

    python benchmarks/single.py [--rounds 13 --rows 2 --context 512 --json FILE]
    python benchmarks/single.py --quick

- gpt2: a plain GPT-2 in PyTorch as nanoGPT writes it: query, key and value in one product, fused
  attention, cross_entropy of all logits
- llama, bert: Hugging Face's; left out where transformers is not installed. BERT has the targets of
  the others, at all positions

A step is forward, loss, backward, clipping to norm 1 and fused AdamW. mpillm's is that of its
trainer. All have the same shape and number of weights. They take turns within each round; ratios
are taken within a round. "Overhead" is a step of the same layers at 8 tokens and 4 features a head:
Python and torch's dispatch, at most.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn
from torch.nn import functional as F

from mpillm.bench.timing import in_turn
from mpillm.models.block_settings import BlockSettings
from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder import EncoderConfig
from mpillm.models.families.family_catalog import family_of
from mpillm.parallel.pipeline.stage import Batch
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import make_mesh, plan_step
from mpillm.system.malloc import keep_pages
from mpillm.tasks.causal_lm import CausalLM
from mpillm.train.optimizers.adamw import AdamWSettings
from mpillm.train.optimizers.optimizer import make_optimizer

Step = Callable[[], float]
LEAST_SPEED = 1.0
KINDS: dict[str, dict[str, object]] = {
    "gpt2": {"norm": "layernorm", "positions": "learned", "activation": "gelu", "bias": True},
    "llama": {},
    "bert": {"token_types": 2},
}


class GPTBlock(nn.Module):
    """A pre-norm block with one product for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        qkv = self.qkv(self.norms[0](x_BTC)).chunk(3, dim=-1)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in qkv)
        a_BHTD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.out(a_BHTD.transpose(1, 2).flatten(2))
        inside = F.gelu(self.up(self.norms[1](x_BTC)), approximate="tanh")
        return x_BTC + self.down(inside)


class PlainGPT(nn.Module):
    """GPT-2 with a tied head; returns the mean loss."""

    def __init__(self, spec: DecoderConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(spec.vocab_size, spec.width)
        self.positions = nn.Embedding(spec.context, spec.width)
        self.blocks = nn.ModuleList(GPTBlock(spec.width, spec.heads) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width)
        self.head = nn.Linear(spec.width, spec.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        places_T = torch.arange(ids_BT.shape[1])
        x_BTC = self.tokens(ids_BT) + self.positions(places_T)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits_BTV = self.head(self.norm(x_BTC))
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def hugging_face(spec: BlockSettings) -> nn.Module:
    """Make Hugging Face's model of these settings; its forward gives the mean loss."""
    import transformers

    settings = family_of(spec).config(spec)
    config = transformers.AutoConfig.for_model(**settings, use_cache=False)
    config._attn_implementation = "sdpa"
    model = getattr(transformers, settings["architectures"][0])(config)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
            # An encoder's loss shifts no labels.
            shifted = {"shift_labels": targets_BT} if spec.causal else {}
            labels = ids_BT if spec.causal else targets_BT
            loss: Tensor = self.model(input_ids=ids_BT, labels=labels, **shifted).loss
            return loss

    return Loss()


def peer_step(model: nn.Module, spec: BlockSettings, tokens_BT: Tensor) -> Step:
    """Make a plain training step of a peer."""
    count = sum(weight.numel() for weight in model.parameters())
    assert count == spec.parameters, f"{count:,} weights, and ours has {spec.parameters:,}"
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    # Contiguous: Hugging Face's loss takes a view of its targets.
    ids_BT, targets_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = model(ids_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def our_step(spec: BlockSettings, tokens_BT: Tensor) -> Step:
    """Make the step of mpillm's trainer on one rank."""
    rows, context = len(tokens_BT), tokens_BT.shape[1] - 1
    parallel, settings, task = ParallelSettings(), AdamWSettings(warmup_steps=0), CausalLM()
    mesh, plan = make_mesh(MPI.COMM_SELF, parallel, spec, rows), plan_step(spec, parallel, 1, rows)
    model = ShardedModel(spec, task, 1, mesh, plan, parallel)
    optimizer = make_optimizer(settings, model.stepped)
    fields = task.fields({"tokens": tokens_BT.numpy()})
    batch = Batch([fields], rows * context)

    def step() -> float:
        passes = model.train(batch)
        model.clip_(settings.clip)
        optimizer.step()
        model.gradients.updated()
        return sum(passes.losses)

    return step


def make_steps(spec: BlockSettings, kind: str, rows: int, context: int) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(spec.vocab_size, (rows, context + 1), generator=generator)
    torch.manual_seed(1)
    steps = {"mpillm": our_step(spec, tokens_BT)}
    if kind == "gpt2":
        steps["plain GPT-2"] = peer_step(PlainGPT(spec), spec, tokens_BT)
    elif importlib.util.find_spec("transformers"):
        steps["Hugging Face"] = peer_step(hugging_face(spec), spec, tokens_BT)
    return steps


def cpu_seconds(step: Step) -> float:
    begun = time.process_time()
    step()
    return time.process_time() - begun


def measure(kind: str, options: argparse.Namespace) -> dict[str, object]:
    """Measure one shape; return the figures in SI units."""
    architecture = EncoderConfig if kind == "bert" else DecoderConfig
    spec = architecture(
        layers=options.layers,
        width=options.width,
        heads=options.heads,
        context=options.context,
        vocab_size=options.vocabulary,
        **KINDS[kind],
    )
    steps = make_steps(spec, kind, options.rows, options.context)
    first = {name: step() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds):
        for name in in_turn(list(steps), turn):
            seconds[name].append(cpu_seconds(steps[name]))
    small = make_steps(spec.replace(width=4 * spec.heads, context=8), kind, 1, 8)
    overhead = {
        name: float(np.median([cpu_seconds(step) for _ in range(25)]))
        for name, step in small.items()
    }
    ours = np.array(seconds["mpillm"])
    return {
        "parameters": spec.parameters,
        "first_losses": first,
        "seconds": seconds,
        "overhead_seconds": overhead,
        "speed_quartiles": {
            name: np.percentile(np.array(theirs) / ours, [25, 50, 75]).tolist()
            for name, theirs in seconds.items()
            if name != "mpillm"
        },
    }


def report(kind: str, figures: dict[str, object]) -> None:
    print(f"\n{kind}: {figures['parameters']:,} weights")
    for name, seconds in figures["seconds"].items():
        low, middle, high = (1e3 * each for each in np.percentile(seconds, [25, 50, 75]))
        extra = 1e3 * figures["overhead_seconds"][name]
        print(
            f"  {name:12s} {middle:7.1f} ms a step [{low:.1f}..{high:.1f}], overhead {extra:.1f} ms"
            f" ({extra / middle:.1%}), first loss {figures['first_losses'][name]:.3f}"
        )
    for name, (low, middle, high) in figures["speed_quartiles"].items():
        verdict = "reached" if middle >= LEAST_SPEED else "MISSED"
        medians = np.median(figures["seconds"][name]) / np.median(figures["seconds"]["mpillm"])
        print(
            f"  {verdict:7s} {middle:.3f} [{low:.3f}..{high:.3f}] × as fast as {name}; "
            f"of medians {medians:.3f}"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("rounds", 13),
        ("rows", 2),
        ("context", 512),
        ("layers", 6),
        ("width", 384),
        ("heads", 6),
        ("vocabulary", 8192),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kinds", default="gpt2,llama,bert", help="with commas")
    parser.add_argument("--quick", action="store_true", help="3 rounds of half as many tokens")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.quick:
        options.rounds, options.context = 3, options.context // 2
    keep_pages()  # as `mpillm train` does; here for the peers too
    torch.set_num_threads(1)
    print(f"{options.rows} × {options.context} tokens a step, {options.rounds} rounds, float32")
    found = {}
    for kind in options.kinds.split(","):
        if kind == "llama" and not importlib.util.find_spec("transformers"):
            print("\nwithout Hugging Face's Llama; for it: pip install transformers")
        found[kind] = measure(kind, options)
        report(kind, found[kind])
    if options.json:
        options.json.write_text(json.dumps({**vars(options), **found}, indent=1, default=str))


if __name__ == "__main__":
    main()
