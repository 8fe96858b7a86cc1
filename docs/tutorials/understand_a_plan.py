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
# # Understand a plan
#
# A plan says which channels stay, in plain JSON. This page makes one, looks at why it is as it is, changes it by
# hand, and asks how well each choice could be made good.

# %%
import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import torch

import mimicut
from mimicut import demo

torch.set_num_threads(1)
teacher = mimicut.load_teacher("demo:vgg7")
few = demo.few_images(50, seed=2021)
anatomy = mimicut.trace(teacher.model, few[:2])

# %% [markdown]
# ## Groups
#
# Channels that must be kept or removed together form a unit, units among which a plan may choose form a group. A
# plain network has one group for each layer; the last one makes the features at the seam and stays whole.

# %%
for group in anatomy.groups.values():
    print(f"{group.name:<14}{group.width:>4} units  {group.pinned or 'free'}")

# %% [markdown]
# ## Evidence
#
# What matters is decided by the images, not by the size of weights: for each channel, how much of the layers that
# read it would be lost without it, given that the others may make up for it. With half of the MACs left:

# %%
evidence = mimicut.channel_evidence(teacher.model, anatomy, few)
plan = mimicut.make_plan(teacher.model, anatomy, keep=0.5, evidence=evidence)
by_size = mimicut.make_plan(teacher.model, anatomy, keep=0.5, score="l1")
names = list(plan.keep)
kept = np.array([[len(p.keep[n]) / anatomy.groups[n].width for n in names] for p in (plan, by_size)])
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for row, label, offset in zip(kept, ("by evidence", "by the size of weights"), (-0.2, 0.2), strict=True):
    axes.bar(np.arange(len(names)) + offset, 100 * row, 0.4, label=label)
axes.set_xticks(range(len(names)), names)
axes.set_ylabel("channels that stay, %")
_ = axes.legend(frameon=False)

# %% [markdown]
# ## The closed form
#
# The layers that read what was removed are solved for anew, by least squares on the images: no training, a second or
# two. It shows at once what a plan is worth. The error is that of the features at the seam, relative to their
# variance.

# %%
patches, labels = demo.test_set()
patches, labels = patches[:2000], labels[:2000]


@torch.no_grad()
def figures(model):
    with mimicut.capturing(model.eval(), anatomy.seam) as capture:
        features, scores = capture.features_and_output(patches)
    return features[0], (scores.argmax(1) == labels).float().mean().item()


features, accuracy = figures(teacher.model)
print(f"teacher: {accuracy:.1%}")
spread = (features - features.mean(0)).square().sum()
for name, each in (("by evidence", plan), ("by size", by_size)):
    for how in ("cut", "closed form"):
        student = mimicut.cut(teacher.model, each)
        if how == "closed form":
            mimicut.closed_form(mimicut.CutStudent(teacher.model, student, anatomy, each), few)
        own, accuracy = figures(student)
        print(f"{name}, {how}: error {(own - features).square().sum() / spread:.3f}, accuracy {accuracy:.1%}")

# %% [markdown]
# ## Changing it by hand
#
# `widths` of a plan can be edited, in its JSON file or here; `replan` chooses the channels of what was edited, and
# says what it costs.

# %%
first = names[0]
edited = dataclasses.replace(plan, widths={**plan.widths, first: anatomy.groups[first].width})
wider = mimicut.replan(teacher.model, anatomy, edited)
for name, each in (("as planned", plan), (f"{first} whole", wider)):
    print(f"{name}: {each.macs['student'] / each.macs['teacher']:.1%} of the MACs")

# %% [markdown]
# Next: [what a certificate says, and what not](certificate_and_its_limits.py).
