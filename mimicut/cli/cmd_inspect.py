"""mimicut inspect"""

from pathlib import Path
from typing import Annotated

import typer

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
    picture: Annotated[
        Path | None, typer.Option(help="File for a drawing of the layers, .png, .svg or .pdf; a dark one beside it")
    ] = None,
) -> None:
    """Show a network's seam, its channel groups, what is pinned and why, and what budgets would give."""
    set_threads(threads)
    from mimicut.results.picture import check_picture, draw_layers
    from mimicut.workflow.inspection import inspect as look

    if picture is not None:
        check_picture(picture)

    found = teacher_from(teacher, weights, pretrained, num_classes, part, input_size)
    facts = look(found.model, blank_example(found), seam=seam)
    say(anatomy_table(facts))
    pictures = [] if picture is None else draw_layers(picture, facts, teacher)
    for each in pictures:
        say(f"drawn: {each}")
    answer({"teacher": teacher, **facts, "pictures": [str(each) for each in pictures]})
