"""What a job's optimizations will do, before anything is trained: a walk over them, one handler for each type.

dry_run = DryRun(baseline)
for position, step in enumerate(spec.optimizations):
    dry_run.step(step, f"/optimizations/{position}")        # InvalidSpec: the mistakes of this step
dry_run.network.graph, dry_run.rows, dry_run.warnings       # as planned; what happens to each layer
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from app.errors import Fault, InvalidSpec
from app.network.cost import cost
from app.network.graph import Graph
from app.planning.dry_run_channels import count_channels, plan_sensitivity
from app.planning.dry_run_int8 import plan_quantize, quantize_faults
from app.planning.dry_run_low_rank import plan_replacement, replacement_faults
from app.planning.dry_run_prune import plan_prune, prune_faults
from app.planning.faults import raise_first
from app.planning.named_layers import possible_name_faults
from app.planning.planned_network import LayerPlan, PlannedNetwork, PlannedStep
from app.spec.low_rank import LowRank, Separable
from app.spec.optimizations import REWRITES, Compression, Distill, Optimization, Regularization
from app.spec.prune import Prune
from app.spec.quantize import Quantize
from app.spec.sensitivity import Sensitivity
from app.spec.step import JobStep

# Choosing channels takes about 6 us of a core for each channel of each layer's output: a second for ResNet-152.
MOST_CHOICES = 1_500_000  # channels over all steps of a job: a longer wait for a plan is refused


@dataclass(frozen=True)
class StepHandler:
    """The dry run of one type of optimization.

    `faults` are the mistakes that are known without working the step out, such as names of layers that are not there.
    `plan` works it out; it raises InvalidSpec for mistakes that only then are known. Both get the network before the
    step, the step, and its pointer.
    """

    faults: Callable[[PlannedNetwork, Any, str], Iterable[Fault]]
    plan: Callable[[PlannedNetwork, Any, str], PlannedStep]


def _no_faults(network: PlannedNetwork, step: JobStep, pointer: str) -> Iterable[Fault]:
    return ()


def _leave_unchanged(network: PlannedNetwork, step: JobStep, pointer: str) -> PlannedStep:
    return PlannedStep(network)


UNCHANGED = StepHandler(_no_faults, _leave_unchanged)
"""For steps that change nothing here: rewrites are in the network already when the dry run begins, and a term of the
training changes no shape."""
HANDLERS: Mapping[type[JobStep], StepHandler] = {
    **dict.fromkeys(REWRITES, UNCHANGED),
    Regularization: UNCHANGED,
    Distill: UNCHANGED,
    Prune: StepHandler(prune_faults, plan_prune),
    LowRank: StepHandler(replacement_faults, plan_replacement),
    Separable: StepHandler(replacement_faults, plan_replacement),
    Quantize: StepHandler(quantize_faults, plan_quantize),
}


class DryRun:
    """The network as planned so far, the rows and warnings of the steps so far."""

    def __init__(self, baseline: Graph) -> None:
        self.network = PlannedNetwork(baseline, cost(baseline))
        self.rows: list[LayerPlan] = []
        self.warnings: list[Fault] = []
        self._choices = 0  # channels of the layers' outputs, summed over the steps that choose among them

    def step(self, step: Optimization, pointer: str) -> None:
        """Go through one optimization, which stands at `pointer`: note its rows, its warnings and the network after it.

        Raises InvalidSpec with the mistakes of the step; the network stays as it was then.
        """
        handler = HANDLERS[type(step)]
        raise_first(possible_name_faults(self.network.possible, step, pointer))
        raise_first(handler.faults(self.network, step, pointer))
        if isinstance(step, Compression) and not step.zeros:
            self._count_choices(pointer)
        self._note(handler.plan(self.network, step, pointer))

    def check_sensitivity(self, options: Sensitivity, pointer: str) -> None:
        """Check that a table of sensitivities has a group of channels to cut; note which layers are measured.

        Raises InvalidSpec if a named layer is unknown, or no group of channels may be cut.
        """
        raise_first(prune_faults(self.network, options.step(options.kept[-1]), pointer))
        self._count_choices(pointer)
        self._note(plan_sensitivity(self.network, options, pointer))

    def _note(self, planned: PlannedStep) -> None:
        self.network = planned.network
        self.rows += planned.rows
        self.warnings += planned.warnings

    def _count_choices(self, pointer: str) -> None:
        """Add the channels that a step chooses among. Raises InvalidSpec at `pointer` if they are too many."""
        self._choices += count_channels(self.network.graph)
        if self._choices > MOST_CHOICES:
            message = f"the layers have too many channels to choose from: {self._choices} over all steps so far"
            raise InvalidSpec([Fault(pointer, message, limit=MOST_CHOICES, value=self._choices)])
