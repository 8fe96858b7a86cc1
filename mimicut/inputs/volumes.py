"""Volumes and clips, from arrays, files and folders of frames, as samples (C, D, H, W) of an `InputSource`.

* **Floating-point arrays** (N, C, D, H, W), `.npy` files of them, and NIfTI files (`.nii`, `.nii.gz`, by nibabel) are
  taken as *already prepared*: nothing is resized or normalised. All must have one size.
* **uint8 arrays** are scaled to 0..1 and normalised by the teacher's mean and deviation, and not resized.
* **Folders of frames**: every folder that holds pictures is one clip; its frames, in the order of their names, are
  resized, cropped and normalised as the teacher's images are. Of each as many are taken, evenly spread, as the network
  is traced with, or as the shortest clip has.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimicut.base.errors import InputError, one_line
from mimicut.inputs.image_set import read_images
from mimicut.inputs.image_sources import files_in, read_arrays
from mimicut.inputs.input_source import Inputs, InputSource
from mimicut.inputs.preprocessing import Preprocessing

_NIFTI = (".nii", ".nii.gz")


def read_samples(source: Any, inputs: Inputs, preprocessing: Preprocessing) -> InputSource:
    """Samples for a network that takes what `inputs` says.

    Args:
        source: As `InputSource` takes it; `.npz` or `.safetensors` files with an array for each input; volumes and
            clips as `read_volumes` reads them, for a network with one input of five axes.
        inputs: What the network takes.
        preprocessing: As in `read_volumes`.

    Raises:
        InputError: Nothing can be read, or samples are not what the network takes.
    """
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is not None and path.suffix in (".npz", ".safetensors"):
        arrays = read_arrays(path)
        keys = list(arrays) if isinstance(inputs.keys, int) else inputs.keys
        absent = [key for key in keys if key not in arrays]
        if absent or (isinstance(inputs.keys, int) and len(keys) != inputs.keys):
            wanted = inputs.keys if isinstance(inputs.keys, int) else ", ".join(inputs.keys)
            raise InputError(f"reading {path}: found {', '.join(arrays)}, expected the network's inputs: {wanted}")
        if isinstance(inputs.keys, int):
            return InputSource(list(zip(*(arrays[key] for key in keys), strict=True)))
        more = [key for key in inputs.optional if key in arrays]
        return InputSource({key: arrays[key] for key in (*keys, *more)})
    if inputs.keys == 1 or (not isinstance(inputs.keys, int) and len(inputs.keys) == 1 and path is not None):
        return read_volumes(source, preprocessing, inputs.depth)
    if path is not None:
        raise InputError(
            f"reading {path}: the network takes several inputs ({inputs.keys}), expected a file with an array for each "
            "(.npz, .safetensors); in Python also an InputSource, or a Dataset of dictionaries or tuples"
        )
    return InputSource(source, keys=inputs.keys, optional=inputs.optional)


def read_volumes(source: Any, preprocessing: Preprocessing, depth: int | None = None) -> InputSource:
    """Read volumes or clips.

    Args:
        source: An array or tensor (N, C, D, H, W), a sequence of arrays (C, D, H, W), a file or a folder, as at the
            head of this file.
        preprocessing: How frames, and uint8 arrays, are prepared.
        depth: Number of frames of each clip; None for those of the shortest.

    Raises:
        InputError: Nothing can be read, sizes differ, or nibabel is missing.
    """
    if not isinstance(source, (str, Path)):
        return InputSource(_Prepared(source, preprocessing))
    path = Path(source)
    if path.is_file():
        return InputSource(_Prepared(_batch_of(path), preprocessing))
    if not path.is_dir():
        raise InputError(f"reading volumes: {str(path)!r} is no file or folder; check the path")
    files = [p for p in sorted(path.rglob("*")) if p.name.endswith((".npy", *_NIFTI)) and not p.name.startswith(".")]
    if files:
        return InputSource(
            _Prepared([_volume(p) for p in files], preprocessing), names=[str(p.relative_to(path)) for p in files]
        )
    return _clips(path, preprocessing, depth)


class _Prepared:
    """Volumes one by one, those of uint8 normalised."""

    def __init__(self, volumes: Sequence[Any] | Tensor | np.ndarray, preprocessing: Preprocessing):
        self._volumes, self._preprocessing = volumes, preprocessing

    def __len__(self) -> int:
        return len(self._volumes)

    def __getitem__(self, index: int) -> Tensor:
        volume = self._volumes[index]
        volume = volume[0] if isinstance(volume, (tuple, list)) else volume
        volume = volume if isinstance(volume, Tensor) else torch.as_tensor(np.ascontiguousarray(volume))
        if volume.dim() != 4 and volume.is_floating_point():
            return volume.float()  # no volume: whatever the network takes
        if volume.dim() != 4:
            raise InputError(
                f"reading volume {index}: found shape {tuple(volume.shape)}, expected (C, D, H, W): channels, depth or "
                "frames, height, width"
            )
        if volume.dtype != torch.uint8:
            return volume.float()
        if len(volume) != self._preprocessing.input_size[0]:
            raise InputError(
                f"reading volume {index}: found uint8 with {len(volume)} channels, expected "
                f"{self._preprocessing.input_size[0]}, one for each mean; give floating point, or mean and std"
            )
        return self._preprocessing.normalise(volume.transpose(0, 1)).transpose(0, 1)


def _batch_of(path: Path) -> Any:
    """The volumes of one file: all of an array with five axes, else one."""
    volume = _volume(path)
    return volume if volume.ndim == 5 else volume[None]


def _volume(path: Path) -> np.ndarray:
    """(C, D, H, W) of a file, or (N, C, D, H, W) of an array file; a missing axis of channels is added."""
    try:
        if path.name.endswith(_NIFTI):
            values = _nifti(path)
            values = values if values.ndim != 4 else np.moveaxis(values, -1, 0)
        else:
            values = np.load(path, allow_pickle=False)
    except InputError:
        raise
    except Exception as error:  # a damaged file raises many kinds
        raise InputError(f"reading {path}: {one_line(error)}; expected a volume of numbers (.npy, .nii)") from error
    return values[None] if values.ndim == 3 else values


def _nifti(path: Path) -> np.ndarray:
    if find_spec("nibabel") is None:
        raise InputError(f"reading {path}: nibabel is not installed; pip install 'mimicut[volumes]'")
    import nibabel

    return np.asarray(nibabel.load(path).get_fdata(dtype=np.float32))


def _clips(folder: Path, preprocessing: Preprocessing, depth: int | None) -> InputSource:
    clips: dict[Path, list[Path]] = {}
    for file in files_in(folder):
        clips.setdefault(file.parent, []).append(file)
    if not clips:
        raise InputError(
            f"reading volumes from {folder}: found neither .npy, .nii nor pictures; expected files of volumes, or a "
            "folder of frames for each clip"
        )
    frames = depth or min(map(len, clips.values()))
    short = [str(path) for path, files in clips.items() if len(files) < frames]
    if short:
        raise InputError(f"reading the clip {short[0]}: found fewer than {frames} frames, which the network takes")
    made = []
    for path, files in clips.items():
        chosen = [str(files[i * len(files) // frames]) for i in range(frames)]
        images = read_images(chosen, preprocessing, memory_bytes=0, keep="evaluated")
        if images.skipped:
            raise InputError(f"reading the clip {path}: {images.skipped[0][0]}: {images.skipped[0][1]}")
        made.append(images.batch().transpose(0, 1))
    names = [str(path.relative_to(folder)) for path in clips]
    return InputSource(made, names=names, notes=[f"{len(made)} clips of {frames} frames each"])
