"""What the files that build models share: the built model, and checks made before weights are downloaded."""

import difflib
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mimicut.base.errors import InputError
from mimicut.inputs.preprocessing import Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # Source: torchvision's presets.
IMAGENET_STD = (0.229, 0.224, 0.225)
OWN_PREPROCESSING = Preprocessing((3, 224, 224), IMAGENET_MEAN, IMAGENET_STD)
PROBE_SECONDS = 5  # To find out whether a weights server answers; timm's own retries take 45 s to give up.


@dataclass
class BuiltModel:
    """A model as its library or its own function built it.

    Attributes:
        model: The network, not yet checked.
        preprocessing: How its images are to be prepared.
        views: A key of `VIEWS`, where its source names one.
        options: What the name of the model does not say, but building the same architecture without weights needs;
            plain data for JSON.
        notes: Sentences that a person should see.
        classes: The name of each class, where the weights give them; else empty.
        call: How the network takes its images, where it takes more than images (`preprocessing.model_inputs`).
    """

    model: nn.Module
    preprocessing: Preprocessing
    views: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    call: dict[str, Any] | None = None


def refuse_new_head(spec: str, requested: int, available: int) -> None:
    """Refuse pretrained weights for another number of classes: the head would be untrained.

    Args:
        spec: The name of the teacher, for the message.
        requested: Number of classes that the user asked for; 0 removes the head.
        available: Number of classes that the pretrained weights have.

    Raises:
        InputError: The two numbers differ, and `requested` is not 0.
    """
    if requested not in (available, 0):
        raise InputError(
            f"loading {spec}: its pretrained weights have {available} classes, found num_classes {requested}: the head "
            "would be untrained; give --weights FILE with your own, or --no-pretrained"
        )


def in_hub_cache(url: str) -> bool:
    """Whether torch.hub has already downloaded the file at `url`."""
    return (Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]).is_file()


def check_reachable(
    spec: str,
    url: str,
    missing: str = "its pretrained weights are not",
    instead: str = "give --weights FILE, or --no-pretrained for random weights",
) -> None:
    """Check that a server answers before a download from it is tried; any answer counts, also a refusal.

    Args:
        spec: The name of the teacher, for the message.
        url: An address on that server.
        missing: The part of the message that says what is absent; "in the local cache" follows.
        instead: The part of the message that says what to do.

    Raises:
        InputError: There was no answer within PROBE_SECONDS.
    """
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        raise InputError(
            f"loading {spec}: {missing} in the local cache, and {url} cannot be reached "
            f"({getattr(error, 'reason', error)}); {instead}"
        ) from error


def unknown_model(library: str, name: str, known: Sequence[str]) -> InputError:
    """The error for a model that `library` does not have, with the nearest names that it has."""
    near = difflib.get_close_matches(name, known, 5) or [n for n in known if n.startswith(name)][:5]
    return InputError(
        f"loading {library}:{name}: {library} has no such model"
        + (f"; close to it: {', '.join(near)}" if near else f"; it has {len(known)}, such as {', '.join(known[:3])}")
    )
