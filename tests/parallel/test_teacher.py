"""A step with a teacher, on ranks that share the batch, compared with the formula."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from mpi4py import MPI
from torch import Tensor
from torch.nn import functional as F

from mpillm.errors import LayoutError, MismatchError, RecipeError
from mpillm.machine.node_map import NodeMap
from mpillm.models.adapt import tune
from mpillm.models.classifiers import LSTMConfig
from mpillm.models.decoder import DecoderConfig
from mpillm.models.encoder import EncoderConfig
from mpillm.models.encoder_decoder import EncoderDecoderConfig
from mpillm.models.layers.block import Block
from mpillm.models.linear_head import plain_outputs
from mpillm.models.part_module import create, initialise
from mpillm.models.spec import Part
from mpillm.models.tuning import Tuning
from mpillm.parallel.pipeline.stage import Batch
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.sharded_model import ShardedModel
from mpillm.parallel.step_plan import StepPlan, make_mesh, plan_step
from mpillm.parallel.teacher import Teacher
from mpillm.parallel.teacher_plan import TeacherPlan
from mpillm.tasks.chat import Chat
from mpillm.tasks.distillation.distillation_settings import DistillationSettings
from mpillm.tasks.seq2seq import SequenceToSequence
from mpillm.tasks.sequence_classification import SequenceClassification
from mpillm.tasks.task import Task

ROWS, T, V = 12, 9, 40
STUDENT = DecoderConfig(vocab_size=V, layers=2, width=16, heads=2, context=T)
TEACHER = DecoderConfig(vocab_size=V, layers=3, width=24, heads=2, context=2 * T)
NAMED = {"teacher": "runs/teacher"}
WAYS: dict[str, dict[str, Any]] = {
    "logits": {"alpha": 0.7, "temperature": 3.0},
    "projected": {"hidden": "mse", "hidden_weight": 2.0},
    "cosine of two layers": {"alpha": 0.0, "hidden": "cosine", "layers": ((0, 0), (1, 2))},
}


def batch() -> dict[str, Tensor]:
    """Return targets of which the last rows have few: ranks have unequal shares."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(V, (ROWS, T + 1), generator=generator)
    counts = torch.rand(ROWS, T, generator=generator) < torch.linspace(1, 0.05, ROWS)[:, None]
    return {"ids": ids[:, :-1], "targets": ids[:, 1:], "counts": counts}


def planned(comm: MPI.Intracomm, settings: DistillationSettings) -> StepPlan:
    plan = plan_step(STUDENT, ParallelSettings(), comm.size, ROWS, 1)
    made = TeacherPlan.of(settings, STUDENT, TEACHER)
    return replace(plan, teacher=made, tuning=Tuning(projections=made.projections))


def outputs_of_blocks(model: Any, fields: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return the logits of a whole model and the output of each block, by hooks."""
    kept: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, made: kept.append(made))
        for module in model.modules()
        if isinstance(module, Block)
    ]
    logits = model(fields["ids"])
    for hook in hooks:
        hook.remove()
    return logits, kept


def by_definition(
    student: Any, teacher: Any, settings: DistillationSettings, projections: dict[int, Tensor]
) -> list[Tensor]:
    """Compute the mean loss of the batch and its parts."""
    fields = batch()
    z_BTV, own = outputs_of_blocks(student, fields)
    with torch.no_grad():
        y_BTV, theirs = outputs_of_blocks(teacher, fields)
    weights_BT = fields["counts"] / fields["counts"].sum()
    task_BT = F.cross_entropy(z_BTV.transpose(1, 2), fields["targets"], reduction="none")
    t, alpha = settings.temperature, settings.alpha
    log_BTV = (z_BTV / t).log_softmax(-1), (y_BTV / t).log_softmax(-1)
    kl_BT = F.kl_div(*log_BTV, reduction="none", log_target=True).sum(-1)
    parts = [(each * weights_BT).sum() for each in (task_BT, kl_BT)]
    loss = (1 - alpha) * parts[0] + alpha * t**2 * parts[1]
    if settings.hidden == "none":
        return [loss, *parts]
    terms = []
    for mine, other in settings.layers or ((1, 2),):
        made = own[mine] @ projections[mine].T
        if settings.hidden == "mse":
            terms.append(F.mse_loss(made, theirs[other], reduction="none").mean(-1))
        else:
            terms.append(1 - F.cosine_similarity(made, theirs[other], -1))
    hidden = (sum(terms) / len(terms) * weights_BT).sum()
    return [loss + settings.hidden_weight * hidden, *parts, hidden]


def students(plan: StepPlan) -> tuple[Any, dict[int, Tensor]]:
    """Make the student of a plan, and projections by blocks, without ranks."""
    student = create(STUDENT, 5)
    tune(student, plan.tuning)
    named = {name: weight for name, weight in student.named_weights() if "projections" in name}
    initialise(student, 5, named.items())
    return student, {int(name.split(".")[1]): weight for name, weight in named.items()}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("zero", [0, 3])
def test_loss_and_gradients_of_a_batch_are_those_of_the_formula(
    way: str, zero: int, comm: MPI.Intracomm
) -> None:
    if zero and comm.size == 1:
        pytest.skip("one rank has no shards")
    settings = DistillationSettings(**NAMED, **WAYS[way])
    # Shards are gathered layer by layer where each rank is on a node of its own.
    nodes = NodeMap(tuple((rank,) for rank in range(comm.size))) if zero else None
    plan, mesh = planned(comm, settings), make_mesh(comm, ParallelSettings(), STUDENT, ROWS, nodes)
    model = ShardedModel(STUDENT, Chat(), 5, mesh, plan, ParallelSettings(zero=zero))
    source = create(TEACHER, 7).requires_grad_(False)
    for weight in source.parameters():
        # Initial weights have almost equal distributions.
        weight.mul_(4.0)
    frozen = model.learn_from(pytest.fail).frozen
    if frozen.fills:
        for name, weight in source.named_weights():
            frozen.fill(name, weight)
    frozen.filled()
    # The ranks of a host have one copy.
    assert sum(comm.allgather(frozen.fills)) == (comm.size if zero else 1)
    fields, first = batch(), comm.rank * plan.rows
    own = [
        {name: each[first + a : first + b] for name, each in fields.items()} for a, b in plan.bounds
    ]
    passes = model.train(Batch(own, float(fields["counts"].sum()), ROWS))
    student, projections = students(plan)
    if settings.hidden != "none":
        assert projections.keys() == {pair[0] for pair in plan.teacher.pairs}
    expected = by_definition(student, source, settings, projections)
    expected[0].backward()
    found = [sum(map(sum, comm.allgather(each))) for each in (passes.losses, *passes.parts)]
    assert found == pytest.approx([float(each.detach()) for each in expected], rel=1e-6)
    if not zero:
        gradients = {name: weight.grad for name, weight in model.stepped.items()}
        wanted = {name: weight.grad for name, weight in student.named_weights()}
        assert gradients.keys() == wanted.keys()
        for name, other in wanted.items():
            assert (gradients[name] - other).norm() < 1e-5 * other.norm(), name
    assert model.clip_(0.0, squares=passes.squares) > 0
    # Nothing of the teacher is stepped on, and nothing is kept between steps.
    assert all(not weight.requires_grad for _, weight in source.named_weights())
    assert all(value is None for part in model.parts.values() for value in part.kept.values())
    model.close()


SMALL: dict[str, Any] = {"vocab_size": V, "layers": 2, "width": 16, "heads": 2, "context": T}
LARGE: dict[str, Any] = {**SMALL, "layers": 3, "width": 24}
CLASSES = {"classes": 5, "head": "sequence"}
PAIR = {"source_context": 7}
KINDS: dict[str, tuple[type[Task], Any, dict[str, Any], str]] = {
    "hidden tokens": (Chat, EncoderConfig, {}, "mse"),
    "classes": (SequenceClassification, EncoderConfig, CLASSES, "none"),
    "targets of a source": (SequenceToSequence, EncoderDecoderConfig, PAIR, "cosine"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_and_two_stacks_learn_from_their_like(kind: str, comm: MPI.Intracomm) -> None:
    task_class, spec_class, more, hidden = KINDS[kind]
    student, large = spec_class(**SMALL, **more), spec_class(**LARGE, **more)
    settings = DistillationSettings(**NAMED, temperature=1.5, hidden=hidden)
    made = TeacherPlan.of(settings, student, large)
    made.check_fit(student, "runs/teacher")
    plan = replace(plan_step(student, ParallelSettings(), comm.size, ROWS), teacher=made)
    part, source = create(student, 5), create(large, 7).requires_grad_(False)
    part.eval()
    tune(part, Tuning(projections=made.projections))
    initialise(part, 5, [each for each in part.named_weights() if "projections" in each[0]])
    teacher = Teacher(plan, make_mesh(comm, ParallelSettings(), student, ROWS), part, pytest.fail)
    if teacher.frozen.fills:
        for name, weight in source.named_weights():
            weight.mul_(4.0)
            teacher.frozen.fill(name, weight)
    teacher.frozen.filled()
    fields = batch()
    if kind == "classes":
        rows = torch.arange(ROWS)
        fields = {"ids": fields["ids"], "lengths": rows % T + 1, "targets": rows % 5}
    elif kind != "hidden tokens":
        fields |= {"source": fields["ids"][:, :7], "source_lengths": torch.arange(ROWS) % 7 + 1}
    outputs = part.forward_part(fields, ()).outputs
    # Masks of dropout are of the student alone.
    given = {**fields, "dropout_keys": torch.arange(ROWS)}
    task = object.__new__(task_class)
    task.label_smoothing = task.z_loss = 0.0
    loss, parts = teacher.objective_sum(task, part, outputs, given)
    z, y = (
        plain_outputs(each.forward_part(fields, ()).outputs)[0] for each in (part, teacher._model)
    )
    log = (z / 1.5).log_softmax(-1), (y / 1.5).log_softmax(-1)
    kl = F.kl_div(*log, reduction="none", log_target=True).sum(-1)
    wanted = (kl * fields.get("counts", 1)).sum().detach()
    assert float(parts[0]) == pytest.approx(
        float(task.loss_sum(outputs, fields).detach()), rel=1e-6
    )
    assert float(parts[1]) == pytest.approx(float(wanted), rel=1e-6)
    total = 0.5 * parts[0] + 0.5 * 1.5**2 * parts[1] + (parts[2] if hidden != "none" else 0)
    assert float(loss.detach()) == pytest.approx(float(total), rel=1e-6)
    loss.backward()
    trained = [weight.grad is not None for name, weight in part.named_weights()]
    assert all(trained)
    teacher.close()


def test_an_architecture_without_outputs_of_layers_is_refused(comm: MPI.Intracomm) -> None:
    spec = LSTMConfig(vocab_size=V, layers=1, width=16, context=T, classes=5)
    made = TeacherPlan(spec, settings_of(), ((0, 0),))
    plan = replace(plan_step(spec, ParallelSettings(), comm.size, ROWS), teacher=made)
    # The other ranks have other stages, and fail too.
    ends = create(spec, 5) if comm.rank == 0 else None
    with pytest.raises(RecipeError, match="which the architecture lstm does not give; set hidden"):
        Teacher(plan, make_mesh(comm, ParallelSettings(), spec, ROWS), ends, pytest.fail)


def test_layers_of_an_encoder_have_no_targets() -> None:
    spec = EncoderDecoderConfig(**SMALL, **PAIR)
    assert TeacherPlan.of(settings_of(layers=((2, 3),)), spec, spec).pairs == ((2, 3),)
    with pytest.raises(RecipeError, match="layer 1 of the model, which reads the source"):
        TeacherPlan.of(settings_of(layers=((1, 3),)), spec, spec)


def settings_of(**more: Any) -> DistillationSettings:
    return DistillationSettings(**NAMED, hidden="mse", **more)


def test_layers_are_numbered_and_projected_where_widths_differ() -> None:
    made = TeacherPlan.of(settings_of(), STUDENT, TEACHER)
    assert made.pairs == ((1, 2),)
    assert [each.name for each in made.projections] == ["projections.1.weight"]
    assert TeacherPlan.of(settings_of(), STUDENT, STUDENT).projections == ()
    with pytest.raises(RecipeError, match=r"layer 3 of the teacher, .* from 0 to 2; name one"):
        TeacherPlan.of(settings_of(layers=((0, 3),)), STUDENT, TEACHER)
    with pytest.raises(RecipeError, match="names a layer of the model twice"):
        TeacherPlan.of(settings_of(layers=((0, 0), (0, 1))), STUDENT, TEACHER)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (TEACHER.replace(vocab_size=41), r"has vocab_size = 41, and the model 40: .*; set model\."),
        (TEACHER.replace(context=T - 1), r"reads context = 8 positions, .* have 9; set model\.co"),
        (
            EncoderConfig(vocab_size=V, layers=1, width=16, heads=2, context=T),
            "gives hidden tokens, and the model gives next tokens; take a teacher that",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher: Any, message: str) -> None:
    made = TeacherPlan.of(settings_of(), STUDENT, teacher)
    with pytest.raises(MismatchError, match=rf"distillation\.teacher: runs/teacher {message}"):
        made.check_fit(STUDENT, "runs/teacher")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"context": 2}, r"parallel\.context = 2 shares .*; leave parallel\.context out, and"),
        ({"tensor": 2}, r"parallel\.tensor = 2 cuts them; leave parallel\.tensor out, or"),
        ({"pipeline": 2}, r"the layers 1 to 1, and \[0\] are in others; compare those of the"),
    ],
)
def test_layouts_that_cannot_compute_the_loss_are_refused(
    sizes: dict[str, int], message: str
) -> None:
    made = TeacherPlan.of(settings_of(layers=((0, 0),)), STUDENT, TEACHER)
    parts = [Part(0, 1), Part(1, 2)] if "pipeline" in sizes else [STUDENT.whole]
    with pytest.raises(LayoutError, match=message):
        made.check_layout(parts, sizes)
