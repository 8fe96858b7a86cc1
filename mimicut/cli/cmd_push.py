"""mimicut push"""

from pathlib import Path
from typing import Annotated

import typer

from mimicut.cli.printing import answer, say


def push(
    folder: Annotated[Path, typer.Argument(help="A result folder")],
    repository: Annotated[str, typer.Argument(help="USER/NAME on the hub; it is made where it does not exist")],
    private: Annotated[bool, typer.Option(help="Make a new repository private")] = False,
    message: Annotated[str, typer.Option(help="Of the commit")] = "Upload a student of mimicut",
) -> None:
    """Publish a result on the Hugging Face hub with a model card, without your pictures and their names."""
    from mimicut.results.hub import push_to_hub

    address = push_to_hub(folder, repository, private=private, message=message)
    say(f"published: {address}")
    answer({"folder": str(folder), "repository": repository, "address": address})
