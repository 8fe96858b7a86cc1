"""Read the network, check its images, and decide what to keep."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import nn

from mimicut.anatomy.find_seam import trace
from mimicut.anatomy.footprint import check_memory, images_within
from mimicut.anatomy.graph import Anatomy
from mimicut.anatomy.outputs import check_declared, class_counts
from mimicut.base import memory
from mimicut.base.errors import InputError
from mimicut.base.guard import on_device
from mimicut.base.progress import SpokenProgress
from mimicut.base.ranks import Ranks
from mimicut.inputs.class_names import check_class_names
from mimicut.inputs.teacher import Teacher
from mimicut.planning.evidence import channel_evidence, needed_bytes
from mimicut.planning.importance import Evidence
from mimicut.planning.int8_choice import note_on_int8, plan_int8
from mimicut.planning.mixtures import plan_mixture
from mimicut.planning.planner import make_plan, replan
from mimicut.planning.survey import Findings
from mimicut.proof.figures import finds_objects
from mimicut.proof.image_check import ImageCheck, check_images
from mimicut.proof.output_figures import check_fit, with_kinds
from mimicut.recovery.batches import on_accelerator
from mimicut.recovery.mimic import check_same
from mimicut.recovery.pair import device_for
from mimicut.recovery.recover import EVIDENCE_SHARE, about
from mimicut.surgery.plan import Plan
from mimicut.workflow.intake import Intake
from mimicut.workflow.request import Request

Say = Callable[[str], None]
SHARE_EVIDENCE = "evidence"  # what the first of several processes asks the others for
_Found = TypeVar("_Found")


class Allowance:
    """The time left for planning and recovery, in seconds; None means no limit."""

    def __init__(self, seconds: float | None):
        self.left = seconds

    def run(self, work: Callable[[], _Found]) -> _Found:
        """Call `work`, deduct the seconds it took, and return its result."""
        begun = time.perf_counter()
        found = work()
        if self.left is not None:
            self.left = max(0.0, self.left - (time.perf_counter() - begun))
        return found


@dataclass(frozen=True)
class Network:
    """The teacher's network and its anatomy. batch_size: number of images in a pass that only measures."""

    model: nn.Module
    anatomy: Anatomy
    batch_size: int


def asks_images(request: Request, plan: Plan | None) -> bool:
    """Whether the images say which channels matter."""
    budget = request.budget
    return plan is None and budget is not None and budget.score is None and request.config.start == "closed_form"


def read_network(teacher: Teacher, request: Request, intake: Intake, plan: Plan | None) -> Network:
    """Trace the teacher's network, and check that it fits in memory.

    Raises:
        UnsupportedModel: The network cannot be traced.
        InputError: There is not enough memory for it, or a kind of output or a threshold does not fit it.
    """
    budget = request.budget
    planned = () if budget is None or budget.searches else budget.drop
    drop = planned if plan is None else tuple(plan.drop)
    seam = plan.seam if plan and not request.seam else None
    anatomy = trace(teacher.model, intake.example, seam, points=request.seam, drop=drop)
    settle_outputs(teacher, anatomy, request)
    passes = needed_bytes(anatomy) if asks_images(request, plan) else 0
    check_memory(anatomy, request.memory_bytes, asked=request.max_memory is not None, passes=passes)
    return Network(teacher.model, anatomy, images_within(anatomy, memory.MEASURING * request.memory_bytes))


def settle_outputs(teacher: Teacher, anatomy: Anatomy, request: Request) -> None:
    """Give the outputs the kinds that the user declared, in place; check that kinds, thresholds and names of classes
    fit the network.

    Raises:
        InputError: One does not.
    """
    anatomy.seam = with_kinds(anatomy.seam, request.output)
    check_declared(anatomy.traced, anatomy.seam.outputs)
    objects = request.min_agreement is not None and finds_objects(teacher.model, anatomy.seam, anatomy.traced.example)
    check_fit(anatomy.seam, request.min_agreement, request.max_error, objects)
    if request.int8 and request.min_agreement is not None and anatomy.seam.scores is None:
        raise InputError(
            f"requiring an agreement of {request.min_agreement} in INT8, where only a row of class scores is compared, "
            "and this network returns none; leave out --min-agreement or --int8"
        )
    if teacher.given is not None and teacher.given.class_names is not None:
        check_class_names(teacher.classes, class_counts(anatomy.traced, anatomy.seam.outputs))


def look_at_images(network: Network, request: Request, intake: Intake) -> ImageCheck:
    """Check the images before anything is learned from them."""
    with on_device(network.model, request.config.device):
        return check_images(
            network.model, network.anatomy.seam, intake.few, intake.call, held_out=intake.held_out,
            beside=intake.choose, batch_size=network.batch_size,
        )  # fmt: skip


def decide(
    teacher: Teacher,
    network: Network,
    intake: Intake,
    request: Request,
    plan: Plan | None,
    allowance: Allowance,
    say: Say,
    ranks: Ranks | None = None,
) -> tuple[Plan, Anatomy]:
    """Decide what to keep.

    Args:
        teacher, network, intake, request: What to compress, how it was read, on which images, and to what budget.
        plan: A given plan, which is resolved again and otherwise kept; None to make one.
        allowance: The time left; planning deducts its own.
        say: Receives a sentence for each stage.
        ranks: The processes of which this is the first; the others wait for what they are asked for (SHARE_EVIDENCE:
            to call `share_evidence`), and then for the plan.

    Returns:
        The plan, and the anatomy without the blocks that it drops.
    """
    model, anatomy, source = network.model, network.anatomy, teacher.to_json()
    if plan is not None:
        return replace(replan(model, anatomy, plan, source), call=intake.call), anatomy
    assert request.budget is not None  # as there is no plan
    evidence = None
    if asks_images(request, plan):
        if ranks is not None:
            ranks.of_first(SHARE_EVIDENCE)
        evidence = allowance.run(lambda: share_evidence(network, intake, request, allowance.left, say, ranks))
    if not request.budget.searches:
        made = make_plan(model, anatomy, request.budget, evidence=evidence, source=source)
        return replace(made, call=intake.call), anatomy
    made = allowance.run(lambda: _mixture(network, intake, request, evidence, allowance.left, say))
    made = replace(made, call=intake.call, teacher={**made.teacher, "source": source})
    return made, trace(model, intake.example, anatomy.seam, drop=made.drop, whole=anatomy)


def share_evidence(
    network: Network, intake: Intake, request: Request, seconds: float | None, say: Say, ranks: Ranks | None
) -> Evidence:
    """The channel evidence, measured by all processes together, or by this one alone."""
    config = request.config
    with on_device(network.model, config.device):
        few = on_accelerator(intake.bound(intake.few), config.views, device_for(config.device, network.model))
        if ranks is not None:
            check_same(ranks, network.model, few)
        evidence = channel_evidence(
            network.model, network.anatomy, few, views=config.views, seed=config.seed,
            max_seconds=None if seconds is None else EVIDENCE_SHARE * seconds, ranks=ranks,
            on_expected=lambda seconds: say(f"measuring on the images which channels matter, {about(seconds)}"),
            on_progress=SpokenProgress(say, "batch or group"), max_memory=request.pass_bytes,
        )  # fmt: skip
    memory.trim()
    return evidence


def _mixture(
    network: Network, intake: Intake, request: Request, evidence: Evidence | None, seconds: float | None, say: Say
) -> Plan:
    assert request.budget is not None  # as there is no plan
    config = request.config
    recipe = config if seconds is None else None  # trials would use up the remaining time
    given = Findings(
        views=config.views, seed=config.seed, evidence=evidence, recipe=recipe, max_memory=request.pass_bytes
    )
    with on_device(network.model, config.device):
        few = intake.bound(intake.few)
        make = plan_int8 if request.int8 and request.budget.latency is not None else plan_mixture
        plan = make(network.model, network.anatomy, few, request.budget, given=given, say=say)
        if request.int8 or not plan.slices or seconds is not None:
            return plan
        note = note_on_int8(network.model, network.anatomy, request.budget)
        return plan if note is None else replace(plan, notes=[*plan.notes, note])
