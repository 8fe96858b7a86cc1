"""mimicut inspect"""

from mimicut.cli.option_values import blank_example, set_threads, teacher_from
from mimicut.cli.options import InputSize, NumClasses, Part, Pretrained, Seam, TeacherArg, Threads, Weights
from mimicut.cli.printing import anatomy_table, answer, say


def inspect(
    teacher: TeacherArg,
    weights: Weights = None,
    pretrained: Pretrained = True,
    num_classes: NumClasses = None,
    part: Part = "",
    input_size: InputSize = None,
    seam: Seam = None,
    threads: Threads = None,
) -> None:
    """Show a network's seam, its channel groups, what is pinned and why, and what budgets would give."""
    set_threads(threads)
    from mimicut.workflow.inspection import inspect as look

    found = teacher_from(teacher, weights, pretrained, num_classes, part, input_size)
    facts = look(found.model, blank_example(found), seam=seam)
    say(anatomy_table(facts))
    answer({"teacher": teacher, **facts})
