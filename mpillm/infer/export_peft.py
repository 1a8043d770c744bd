"""Write the adapters of a run as PEFT reads them."""

from pathlib import Path

from mpillm.errors import UsageError
from mpillm.infer.model_source import BASE
from mpillm.infer.write_tensors import write_tensors
from mpillm.models.families.family import Family
from mpillm.models.spec import ModelSpec
from mpillm.models.tuning import read_adapter
from mpillm.system.json_text import to_json
from mpillm.weights.checkpoint import Checkpoint
from mpillm.weights.checkpoint_source import CheckpointSource
from mpillm.weights.peft_format import CONFIG, TENSORS, peft_config, their_names


def check_adapter(checkpoint: Checkpoint) -> None:
    """Raise UsageError where a checkpoint holds no adapters."""
    if BASE not in checkpoint.facts:
        raise UsageError(
            f"{checkpoint.folder} holds a whole model and no adapters; leave --to peft out, or "
            "train with [adapter]"
        )


def write_adapter(checkpoint: Checkpoint, spec: ModelSpec, family: Family, work: Path) -> int:
    """Write the two files into the folder `work`; return their bytes. One rank calls it.

    Raises RecipeError where the family has no such layers, CheckpointError and OSError where they
    cannot be written.
    """
    source, places = CheckpointSource(checkpoint), family.places(spec)
    adapter = read_adapter(checkpoint.facts["recipe"].get("adapter"))
    names = their_names(source.weights, places)
    reader = str(family.config(spec)["architectures"][0])
    config = peft_config(adapter, names, places, str(checkpoint.facts[BASE]["path"]), reader)
    tensors = {theirs: source.read_weight(ours).contiguous() for ours, theirs in names.items()}
    (work / CONFIG).write_text(to_json(config, indent=1) + "\n", encoding="utf-8")
    write_tensors(work / TENSORS, tensors, work / CONFIG)
    return sum(tensor.nbytes for tensor in tensors.values())
