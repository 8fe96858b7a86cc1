# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---
# %% [markdown]
# # Your first student
#
# A trained network, a few pictures without labels, and a smaller network with the same outputs. Everything here comes
# with the package, so that the page runs anywhere: a small residual network that tells twenty kinds of photograph
# apart (grey patches of 32 x 32 pixels), and fifty patches of other parts of these photographs, without their labels.

# %%
import matplotlib.pyplot as plt
import torch

import mimicut
from mimicut import demo

torch.set_num_threads(1)
teacher = mimicut.load_teacher("demo:resnet14")
few = demo.few_images(50, seed=2021)
print(few.shape)

# %%
figure, axes = plt.subplots(2, 8, figsize=(8, 2.2))
for place, image in zip(axes.flat, few, strict=False):
    place.imshow(image[0], cmap="gray")
    place.set_axis_off()

# %% [markdown]
# ## What can be cut
#
# One forward pass tells where the body ends and the head begins (the *seam*), and which channels depend on each
# other.

# %%
known = mimicut.inspect(teacher.model, few[:2])
print("seam:", known["seam"], "of shape", known["seam_shapes"])
print("head:", known["head"])
print(f"MACs: {known['macs']:,}; in operators that cannot be cut: {known['macs_share_pinned']:.1%}")

# %% [markdown]
# ## Cut, solve, mimic, replace
#
# `compress` does the whole path. A budget of half the MACs; a tenth of the usual steps, so that this page is built
# quickly; ten of the fifty images are set aside and only certify.

# %%
images = mimicut.read_images(few, teacher.preprocessing)
config = mimicut.preset("default", steps=40, views=teacher.views, seed=2021)
result = mimicut.compress(teacher, images, keep=0.5, config=config)
print(result.report.table())

# %% [markdown]
# ## Is it any good?
#
# Ten held-out images prove little, and the certificate says so: its interval is wide. Here we are in a rare position:
# the demo's task has 10,000 labelled test patches, from tiles that nothing above has seen. A user has none.

# %%
patches, labels = demo.test_set()


@torch.no_grad()
def accuracy(model):
    answers = torch.cat([model(part).argmax(1) for part in patches.split(500)])
    return (answers == labels).float().mean().item()


start = mimicut.cut(teacher.model, result.plan)
for name, model in (("teacher", teacher.model), ("cut alone", start), ("student", result.model)):
    print(f"{name}: {accuracy(model):.1%}")

# %% [markdown]
# ## Keep it
#
# `result.save("small/")` writes a folder of plain files; `mimicut.load("small/")` gives the student back, equal to
# the bit, and `mimicut export small/ --to onnx` writes a file for ONNX Runtime. On the command line all of the above
# is
#
# ```console
# $ mimicut compress demo:resnet14 photos/ --keep 0.5 --out small/ --to onnx
# ```
#
# Next: [understand a plan](understand_a_plan.py).
