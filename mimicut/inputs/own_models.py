"""Teachers that the user's own code builds: a function in a file or in a module that can be imported."""

import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from mimicut.base.errors import InputError, MimicutError, one_line
from mimicut.inputs.augment import VIEWS
from mimicut.inputs.built_model import OWN_PREPROCESSING, BuiltModel
from mimicut.inputs.model_checks import network_in
from mimicut.inputs.preprocessing import Preprocessing
from mimicut.inputs.torchvision_models import detector_preprocessing

# Frames of an error's traceback that a user cannot do anything about.
_PACKAGE = str(Path(__file__).parents[1])  # frames of its files are not the user's


def call_builder(build: Callable[..., Any], source: str, options: Mapping[str, Any]) -> BuiltModel:
    """Call the user's function and check what it returns.

    Args:
        build: The function; it is called with num_classes and in_chans where `options` has them, and with model_kwargs.
        source: Where it comes from, for messages.
        options: As `Teacher.options`.

    Raises:
        InputError: The function fails, or returns anything but an nn.Module, alone or in a tuple with a Preprocessing
            or a dict of its fields.
    """
    kwargs = {k: options[k] for k in ("num_classes", "in_chans") if k in options}
    try:
        made = build(**kwargs, **options.get("model_kwargs", {}))
    except MimicutError:
        raise
    except (Exception, SystemExit) as error:
        given = f" called with {kwargs}" if kwargs else ""
        raise InputError(f"building the teacher {source}{given}: {one_line(error)}{_location(error)}") from error
    model, expected = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    notes: list[str] = []
    model = network_in(model, source, notes)
    if not isinstance(model, nn.Module) or not isinstance(expected, (Preprocessing, Mapping, type(None))):
        found = type(made).__name__ + (f" of {[type(m).__name__ for m in made]}" if isinstance(made, tuple) else "")
        raise InputError(
            f"building the teacher {source}: it returned a {found}, expected an nn.Module, or a tuple of one and a "
            "Preprocessing (or a dict of its fields)"
        )
    if not isinstance(expected, Mapping):
        return BuiltModel(model, expected or detector_preprocessing(model) or OWN_PREPROCESSING, notes=notes)
    fields = dict(expected)
    views = fields.pop("views", None)
    if views is not None and views not in VIEWS:
        raise InputError(f"building the teacher {source}: found views {views!r}, expected one of {', '.join(VIEWS)}")
    try:
        return BuiltModel(model, Preprocessing.from_json({**OWN_PREPROCESSING.to_json(), **fields}), views, notes=notes)
    except InputError as error:
        raise InputError(f"building the teacher {source}: {error}") from error


def import_builder(spec: str) -> Callable[..., Any]:
    """The function that "FILE.py:FUNCTION" or "PACKAGE.MODULE:FUNCTION" names; a file is run to get it.

    Raises:
        InputError: There is no such file, module or function, or running it fails.
    """
    place, _, name = spec.rpartition(":")
    path = Path(place)
    if place.endswith(".py") and not path.is_file():
        raise InputError(f"loading the teacher {spec}: there is no file {place}; check the path")
    folder = path.parent if place.endswith(".py") else Path()
    try:
        with _importable(folder, place):
            module = _run_file(path) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise InputError(
            f"loading the teacher {spec}: importing {place}: {one_line(error)}{_location(error)}"
        ) from error
    build = getattr(module, name, None)
    if not callable(build):
        functions = [
            k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        raise InputError(
            f"loading the teacher {spec}: found no function {name!r} in {place}, expected one of its own: "
            f"{', '.join(functions[:5]) or 'it has none'}"
        )

    def build_there(**kwargs: Any) -> Any:
        with _importable(folder, place):  # for imports inside the function
            return build(**kwargs)

    return build_there


def _run_file(path: Path) -> ModuleType:
    # The name depends on the file's name only, so that a class has the same name wherever the file lies.
    name = f"mimicut_teacher_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None  # as for every file whose name ends in .py
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name)
        if before is not None:
            sys.modules[name] = before
        raise
    return module


# Folder and place of a builder -> what its code put before the search path and after it. It is kept, as a module that
# is imported again does not run again.
_ADDED: dict[tuple[str, str], tuple[list[str], list[str]]] = {}


@contextmanager
def _importable(folder: Path, place: str) -> Iterator[None]:
    """Modules beside a user's file, and those where its code has added to the search path, can be imported inside; the
    search path is as before afterwards."""
    before, beside = list(sys.path), str(folder.resolve())
    first, last = _ADDED.setdefault((beside, place), ([], []))
    known = sys.path[:] = [*first, beside, *before, *last]
    try:
        yield
    finally:
        at = next((i for i, path in enumerate(sys.path) if path in known), len(sys.path))
        first[:0] = sys.path[:at]
        last += [path for path in sys.path[at:] if path not in known]
        sys.path[:] = before


def _location(error: BaseException) -> str:
    """The last line of the error's traceback that lies in a file, for someone to look at."""
    frames = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not f.filename.startswith("<") and not f.filename.startswith(_PACKAGE)
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
