"""Whether data, network and training fit together: what types alone cannot say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from app.errors import Fault, InvalidSpec, JsonValue
from app.network.blocks import WEIGHTED
from app.network.cost import Memory
from app.network.graph import Graph
from app.spec.data import DataFacts
from app.spec.job import JobSpec, retraining
from app.spec.model import PresetModel
from app.spec.optimizations import (
    Compression,
    Distill,
    Optimization,
    Regularization,
)
from app.spec.prune import NEED_GRADIENTS, Prune
from app.spec.references import Source
from app.validation.faults import counted

MOST_SYNTHETIC_BYTES = 8 << 30
MOST_COMPRESSIONS = 8  # each has a dry run in full, for networks of any size


def input_shape(spec: JobSpec, facts: DataFacts, source: Source | None = None) -> tuple[int, ...]:
    """The `(C, *spatial)` of the job's network: the model's, else its source's where the data fit it, else the data's.

    Raises InvalidSpec at `/model/input_shape` if nothing says it or if the data does not fit it.
    """
    shape = spec.model.input_shape
    if shape is None and source is not None and source.input_shape is not None:
        fits = spec.data.synthetic is not None or facts.layout(source.input_shape) is not None
        shape = source.input_shape if fits else None
    if spec.data.synthetic is not None:
        if shape is None:
            raise InvalidSpec([Fault("/model/input_shape", "is required with synthetic data, which takes its shape")])
        return _affordable(spec, shape)
    usual = facts.default_input_shape()
    if shape is None:
        if usual is None:
            why = (
                "its pictures have different sizes"
                if facts.example_shape is None
                else f"its examples are {list(facts.example_shape)}"
            )
            message = f"is required: the data set {facts.name} does not say it ({why})"
            raise InvalidSpec([Fault("/model/input_shape", message)])
        return usual
    if facts.layout(shape) is None:
        if facts.example_shape is None:
            message = "pictures become [1, height, width] or [3, height, width]"
        else:
            message = f"does not fit the examples of {facts.name}, which are {list(facts.example_shape)}"
        raise InvalidSpec([Fault("/model/input_shape", message, limit=_list(usual), value=_list(shape))])
    return shape


def _list(shape: Sequence[int] | None) -> JsonValue:
    return None if shape is None else [*shape]


def _affordable(spec: JobSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    synthetic = spec.data.synthetic
    assert synthetic is not None
    size = (synthetic.train + synthetic.test) * math.prod(shape)
    if size > MOST_SYNTHETIC_BYTES:
        message = f"images of {list(shape)} would take {size} bytes; synthetic data may take {MOST_SYNTHETIC_BYTES}"
        raise InvalidSpec([Fault("/data/synthetic/train", message, limit=MOST_SYNTHETIC_BYTES, value=size)])
    return shape


def data_faults(spec: JobSpec, facts: DataFacts) -> Iterator[Fault]:
    """What is wrong between the data, its division and the size of a batch."""
    source = "/data/synthetic" if spec.data.synthetic is not None else "/data/dataset"
    if facts.classes < 2:
        yield Fault(source, "needs at least two classes to learn from", limit=2, value=facts.classes)
    if facts.test < 1:
        yield Fault(source, "has no test images: the report would have nothing to measure", limit=1, value=0)
    if spec.data.limit is not None and spec.data.limit < facts.classes:
        message = f"is less than one image for each of the {facts.classes} classes"
        yield Fault("/data/limit", message, limit=facts.classes, value=spec.data.limit)
    images, held_out = facts.training_images(spec.data)
    if images < 1:
        yield Fault("/data/validation", "leaves no image to train on", limit=0, value=spec.data.validation)
    elif spec.training.batch_size > images:
        message = f"is more than the {counted(images, 'image')} trained on (after limit and validation)"
        yield Fault("/training/batch_size", message, limit=images, value=spec.training.batch_size)
    if spec.training.early_stopping is not None and held_out == 0:
        yield Fault("/training/early_stopping", "needs validation images: raise data.validation", limit=1, value=0)
    if isinstance(spec.model, PresetModel) and spec.model.classes not in (None, facts.classes):
        message = f"differs from the classes of the data: {facts.classes}"
        yield Fault("/model/classes", message, limit=facts.classes, value=spec.model.classes)


def training_faults(spec: JobSpec, most_epochs: int) -> Iterator[Fault]:
    """What is wrong with the lengths of training and retraining."""
    training = spec.training
    if training.epochs > most_epochs:
        message = f"is more than the {most_epochs} epochs that a job may train here"
        yield Fault("/training/epochs", message, limit=most_epochs, value=training.epochs)
    if training.warmup_epochs > training.epochs > 0:
        message = f"the warm-up is longer than the training of {counted(training.epochs, 'epoch')}"
        yield Fault("/training/schedule/warmup", message, limit=training.epochs, value=training.warmup_epochs)
    if training.milestones and training.epochs == 0:
        yield Fault(
            "/training/schedule/milestones", "with 0 epochs there is no training whose rate could fall: leave them out"
        )
    for position, milestone in enumerate(training.milestones if training.epochs else ()):
        if milestone >= training.epochs:
            message = f"is after the last of {counted(training.epochs, 'epoch')}"
            at = f"/training/schedule/milestones/{position}"
            yield Fault(at, message, limit=training.epochs - 1, value=milestone)
    for position, step in enumerate(spec.optimizations):
        if isinstance(step, Compression):
            yield from _retraining_faults(spec, step, f"/optimizations/{position}", most_epochs)


def _retraining_faults(spec: JobSpec, step: Compression, pointer: str, most_epochs: int) -> Iterator[Fault]:
    retrain = retraining(step, spec.training)
    epochs = retrain.epochs or 0
    rounds = step.rounds
    if epochs * rounds > most_epochs:
        message = (
            f"retraining takes {counted(epochs, 'epoch')} in each of {counted(rounds, 'round')}; a job may train "
            f"{most_epochs} here"
        )
        yield Fault(f"{pointer}/retrain/epochs", message, limit=most_epochs // rounds, value=epochs)
    if retrain.policy == "weight_rewind" and epochs > spec.training.epochs:
        message = (
            f"weight_rewind goes back {counted(epochs, 'epoch')}, but the training has only {spec.training.epochs}"
        )
        yield Fault(f"{pointer}/retrain/epochs", message, limit=spec.training.epochs, value=epochs)
    warmup = spec.training.schedule.warmup or 0
    if spec.training.epochs == 0 and retrain.policy == "lr_rewind" and warmup > epochs:
        message = f"the warm-up is longer than the retraining of {counted(epochs, 'epoch')} at {pointer}"
        yield Fault("/training/schedule/warmup", message, limit=epochs, value=warmup)
    if isinstance(step, Prune) and step.schedule.name == "cubic":
        if epochs == 0:
            yield Fault(
                f"{pointer}/schedule/name",
                "cubic raises the sparsity while retraining: policy none has no epochs for it",
            )
        elif step.schedule.epochs is not None and step.schedule.epochs > epochs:
            message = f"the sparsity rises during the {counted(epochs, 'epoch')} of retraining, not longer"
            yield Fault(f"{pointer}/schedule/epochs", message, limit=epochs, value=step.schedule.epochs)


def order_faults(spec: JobSpec) -> Iterator[Fault]:
    """What is wrong with the order of the optimizations, with the reason."""
    steps = spec.optimizations
    compressions = [(position, step) for position, step in enumerate(steps) if isinstance(step, Compression)]
    for position, step in enumerate(steps):
        pointer = f"/optimizations/{position}"
        earlier = [(at, done) for at, done in compressions if at < position]
        if step.why_before_compressions is not None and earlier:
            at, first = earlier[0]
            message = (
                f"{step.type} {step.why_before_compressions}: put it before the {first.type} at /optimizations/{at}"
            )
            yield Fault(pointer, message)
        last = next((done.type for done in steps[:position] if done.must_be_last), None)
        if last is not None and not step.must_be_last:
            yield Fault(pointer, f"{step.type} changes weights that {last} has rounded: put {last} last")
        repeated = next((at for at in range(position) if _repeats(steps[at], step)), None)
        if repeated is not None:
            narrowed = ", or give each other layers" if "layers" in type(step).model_fields else ""
            yield Fault(pointer, f"{step.type} stands at /optimizations/{repeated} too: state it once{narrowed}")
        if isinstance(step, Compression):
            yield from _compression_faults(step, earlier, pointer)


def _compression_faults(step: Compression, earlier: Sequence[tuple[int, Compression]], pointer: str) -> Iterator[Fault]:
    """What is wrong between a compression and those before it, each with its position."""
    if len(earlier) == MOST_COMPRESSIONS:
        message = f"a job compresses at most {MOST_COMPRESSIONS} times"
        yield Fault(pointer, message, limit=MOST_COMPRESSIONS, value=len(earlier) + 1)
    masked = next((at for at, done in earlier if done.zeros), None)
    if masked is not None and not step.zeros:
        message = (
            f"{step.change} before weights are set to zero: the zeros of /optimizations/{masked} belong to the network "
            "before it"
        )
        yield Fault(pointer, message)
    reshaped = next((at for at, done in earlier if not done.zeros), None)
    if reshaped is not None and step.retrain is not None and step.retrain.policy == "weight_rewind":
        message = f"weight_rewind goes back to weights from before /optimizations/{reshaped}, which changes shapes"
        yield Fault(f"{pointer}/retrain/policy", message, value="weight_rewind")


def _repeats(earlier: Optimization, step: Optimization) -> bool:
    """Whether a step does again what an earlier one does, for a layer at least."""
    if type(earlier) is not type(step) or step.may_repeat:
        return False
    names, others = getattr(step, "layers", None), getattr(earlier, "layers", None)
    return names is None or others is None or bool(set(names) & set(others))


def graph_faults(spec: JobSpec, graph: Graph) -> Iterator[Fault]:
    """What is wrong between the network and its training."""
    if not any(node.params for node in graph.nodes):
        yield Fault("/model", "none of the layers has parameters: there is nothing to train")
    norms = [node for node in graph.nodes if node.type == "batch_norm"]
    if spec.training.batch_size == 1 and norms:
        message = f"batch norm ({norms[0].name}) needs at least two examples in a batch to have a variance"
        yield Fault("/training/batch_size", message, limit=2, value=1)


def chooses_by_gradients(spec: JobSpec) -> bool:
    """Whether a choice of the job needs gradients of the loss: then it takes as much memory as a training."""
    if any(isinstance(step, Prune) and step.scope == "learned" for step in spec.optimizations):
        return True
    criteria = [step.criterion for step in spec.optimizations if isinstance(step, Prune)]
    criteria += [spec.sensitivity.criterion] if spec.sensitivity is not None else []
    return any(criterion in NEED_GRADIENTS for criterion in criteria)


def is_taught(spec: JobSpec) -> bool:
    """Whether a teacher answers in a training or retraining of the job."""
    retrainings = [retraining(step, spec.training) for step in spec.optimizations if isinstance(step, Compression)]
    return any(retrain.epochs and retrain.distillation is not None for retrain in retrainings) or any(
        isinstance(step, Distill) for step in spec.optimizations
    )


def memory_faults(spec: JobSpec, memory: Memory, most_bytes: int) -> Iterator[Fault]:
    """A fault where the training's estimated memory is above `most_bytes`, at what would lower it most."""
    if memory.total <= most_bytes:
        return
    batch = spec.training.batch_size
    by_batch = memory.activations > memory.total // 2 and batch > 1
    at = "/training/batch_size" if by_batch else "/model"
    advice = "a smaller batch" if by_batch else "a smaller network"
    message = f"training needs about {memory.total} bytes of memory, the limit is {most_bytes}: choose {advice}"
    yield Fault(at, message, limit=most_bytes, value=memory.total)


def warnings(spec: JobSpec, facts: DataFacts, graph: Graph) -> Iterator[Fault]:
    """What is allowed but probably not meant."""
    if spec.data.limit is not None and spec.data.limit > facts.train:
        yield Fault("/data/limit", f"is more than the {facts.train} training images there are: all are used")
    flips = [name for name in spec.training.augmentation if name.endswith("_flip")]
    if len(graph.input_shape) == 2 and flips:
        yield Fault("/training/augmentation", f"{flips[0]} lets 1-D examples run backwards")
    if spec.sensitivity is not None and facts.training_images(spec.data)[1] == 0:
        message = "no image is held out: the table is measured on training images, which flatter the network"
        yield Fault("/data/validation", message)
    regularizations = [(i, step) for i, step in enumerate(spec.optimizations) if isinstance(step, Regularization)]
    for position, step in regularizations:
        yield from _regularization_warnings(spec, facts, graph, step, f"/optimizations/{position}")


def _regularization_warnings(
    spec: JobSpec, facts: DataFacts, graph: Graph, step: Regularization, pointer: str
) -> Iterator[Fault]:
    decay = spec.training.optimizer.weight_decay + (step.weight_decay or 0)
    if step.l2 and decay:
        total = decay + 2 * step.l2
        message = (
            f"adds to the weight decay of {decay:g}: together they shrink weights like a weight decay of {total:g}"
        )
        yield Fault(f"{pointer}/l2", message)
    elif step.weight_decay and spec.training.optimizer.weight_decay:
        message = (
            f"adds to the optimizer's weight decay of {spec.training.optimizer.weight_decay:g}: together {decay:g}"
        )
        yield Fault(f"{pointer}/weight_decay", message)
    if step.bn_l1 and not any(node.type == "batch_norm" for node in graph.nodes):
        yield Fault(f"{pointer}/bn_l1", "there is no batch norm whose scales it could lower")
    entropy = math.log(max(2, facts.classes))
    absolute, squared = _initial_sums(graph)
    for name, term in (("l1", step.l1 * absolute), ("l2", step.l2 * squared)):
        if term > entropy:
            message = (
                f"the {name} term is about {term:.2g} at the start, more than the cross-entropy of {entropy:.2g}: "
                "the network will learn to have small weights before it learns the classes"
            )
            yield Fault(f"{pointer}/{name}", message)


def _initial_sums(graph: Graph) -> tuple[float, float]:
    """(sum of absolute weights, sum of squared weights) expected of freshly drawn ones: normal, variance 2 / fan_in."""
    absolute = squared = 0.0
    for node in graph.nodes:
        if node.type in WEIGHTED and node.shares is None:
            weight = node.tensors["weight"]
            fan_in = max(1, weight.elements // weight.shape[0])
            absolute += weight.elements * math.sqrt(2 / fan_in) * math.sqrt(2 / math.pi)
            squared += weight.elements * 2 / fan_in
    return absolute, squared
