"""Print a prompt and the text that a trained model writes after it: the work of `generate`."""

from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.comm.failure import on_root
from mpillm.infer.chat_prompt import chat_prompt, template_of
from mpillm.infer.generate import generate, sample_tokens, text_of
from mpillm.infer.loading import load_trained
from mpillm.infer.sampling import Sampling, check_prompt
from mpillm.machine.node_map import map_nodes
from mpillm.parallel.devices import choose_device
from mpillm.system.console import Console
from mpillm.tasks.task_catalog import read_settings
from mpillm.tokens.pairs.pair_shards import PAIR_KINDS

if TYPE_CHECKING:
    from mpi4py import MPI


def print_generation(
    trained: Path,
    prompt: str,
    sampling: Sampling,
    comm: "MPI.Intracomm",
    console: Console,
    device: str = "auto",
    chat: bool | None = None,
) -> None:
    """Print the prompt and the model's continuation as it comes; of a source, or of a user's turn,
    the result alone.

    `chat`: whether the prompt is a user's turn; None: where the model learnt conversations. Every
    rank calls it; rank 0 computes, on `device` (cpu, cuda or auto).
    """
    check_prompt(prompt)
    place, _ = choose_device(device, comm, map_nodes(comm), share=True, option="--device")
    loaded = load_trained(trained, comm, console)
    if comm.rank == 0:
        loaded.model.to(place)
    task = read_settings(loaded.checkpoint.facts["recipe"].get("task", {}))
    if chat is None:
        kinds = [PAIR_KINDS[kind] for kind in loaded.task.pair_kinds if kind in PAIR_KINDS]
        learnt = any(kind.is_chat for kind in kinds)
        chat = learnt and template_of(loaded) is not None
    if chat:
        given = chat_prompt(loaded, prompt)
        tokens = sample_tokens(loaded.model, given.ids, sampling)
        pieces = text_of(tokens, loaded.tokenizer, given.ends)
    else:
        pieces = generate(loaded.model, loaded.tokenizer, prompt, sampling, task)
    # Drawn through on_root: a model that has diverged fails on all ranks together.
    # The first piece ahead of the prompt: a model that cannot generate prints nothing.
    text = on_root(comm, lambda: next(pieces, None))
    if comm.rank == 0 and not chat and not loaded.model.spec.source_field:
        console.write(prompt)
    while text is not None:
        if comm.rank == 0:
            console.write(text)
        text = on_root(comm, lambda: next(pieces, None))
    if comm.rank == 0:
        console.write("\n")
