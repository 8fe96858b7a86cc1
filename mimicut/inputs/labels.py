"""Class numbers of labelled images, from the folders that they lie in."""

import json
from pathlib import Path

from mimicut.base.errors import InputError


def labels_from_folders(names: list[str], folder: str | Path, classes: int) -> list[int]:
    """Class numbers of images, from the first folder of each name relative to `folder`.

    Class folders in sorted order are classes 0, 1, ... (as torchvision's ImageFolder has it), which needs one for each
    of `classes`; otherwise `folder`/class_index.json names them: {"cat": 3} or {"3": ["n02123045", "cat"]}.

    Raises:
        InputError: The folders do not match the classes.
    """
    folder = Path(folder)
    given = [Path(name).relative_to(folder) if Path(name).is_absolute() else Path(name) for name in names]
    loose = next((str(name) for name in given if len(name.parts) < 2), None)
    if loose:
        raise InputError(f"reading labels: {loose!r} is not in a class folder; expected FOLDER/CLASS/IMAGE")
    found = sorted({name.parts[0] for name in given} | {p.name for p in folder.iterdir() if p.is_dir()})
    index = _class_index(folder / "class_index.json")
    if index is None:
        if len(found) != classes:
            raise InputError(
                f"reading labels: {len(found)} class folders, but the network has {classes} classes; write "
                'class_index.json beside them, such as {"cat": 3}'
            )
        index = {name: number for number, name in enumerate(found)}
    strange = sorted({name.parts[0] for name in given} - set(index))
    if strange:
        raise InputError(f"reading labels: class_index.json does not name the folder {strange[0]!r}; add it")
    return [index[name.parts[0]] for name in given]


def _class_index(path: Path) -> dict[str, int] | None:
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {
            (value[0] if isinstance(value, list) else key): int(key if isinstance(value, list) else value)
            for key, value in data.items()
        }
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f'reading {path}: {error}; expected {{"cat": 3}} or {{"3": ["n02123045", "cat"]}}') from error
