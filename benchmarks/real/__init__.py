"""Networks of ImageNet on pictures that none of them was trained on: `python -m benchmarks.real`, see `__main__`.

from benchmarks.real import image_sets, teacher_of
teacher = teacher_of("efficientnet_lite0", 160)
few, test = image_sets(teacher, images=50, seed=2021, test=300)   # of runs/real, made by `fetch`
"""

from benchmarks.real.task import image_sets, teacher_of

__all__ = ["image_sets", "teacher_of"]
