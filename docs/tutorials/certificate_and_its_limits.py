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
# # A certificate and its limits
#
# Every result says on how many held-out images the student agrees with its teacher, with a 95 % interval. What does
# that promise? Here are simulated users: each has other images of the same kind, cuts the same network, and reads the
# certificate. As the demo has 10,000 test patches, we can look up what each of them cannot: the truth.

# %%
import matplotlib.pyplot as plt
import torch

import mimicut
from mimicut import demo

torch.set_num_threads(1)
teacher = mimicut.load_teacher("demo:mobilenetv2_tiny")
patches, _ = demo.test_set()


@torch.no_grad()
def answers(model):
    return torch.cat([model(part).argmax(1) for part in patches.split(500)])


right = answers(teacher.model)

# %% [markdown]
# ## Twelve users
#
# Each has 60 images and sets 24 of them aside. The recipe is the closed form alone, which takes a second or two.

# %%
users = []
for seed in range(12):
    few = mimicut.read_images(demo.few_images(60, seed=seed), teacher.preprocessing)
    config = mimicut.preset("default", "quick", views=teacher.views, seed=seed)
    result = mimicut.compress(
        teacher, few, keep=0.6, score="l1", held_out_share=0.4, split_seed=seed, extra=None, config=config
    )
    report = result.report
    truth = (answers(result.model) == right).float().mean().item()
    users.append((report.top1_agreement, report.top1_agreement_low, report.top1_agreement_high, truth))

# %%
figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
for i, (agreement, low, high, truth) in enumerate(users):
    axes.plot([i, i], [100 * low, 100 * high], color="#1f6f8b")
    axes.plot(i, 100 * agreement, "o", color="#1f6f8b", label="certificate" if i == 0 else None)
    axes.plot(i, 100 * truth, "x", color="#b3362b", label="truth, 10,000 patches" if i == 0 else None)
axes.set_xlabel("user")
axes.set_ylabel("agreement, %")
_ = axes.legend(frameon=False)
inside = sum(low <= truth <= high for _, low, high, truth in users)
print(f"the truth lies inside the interval of {inside} of {len(users)} users")

# %% [markdown]
# ## What it promises
#
# The interval is the exact binomial one (Clopper and Pearson): for images like the held-out ones, at least 95 of 100
# such intervals hold the truth. With 24 images it is wide; four times as many make it half as wide. `--crossfit 5`
# uses every image to certify once, at the price of training five times as often.
#
# ## What it does not promise
#
# Images of another kind are not covered. The same student on patches whose contrast is a third of what it was:

# %%
report = result.report
weak = patches / 3
with torch.no_grad():
    ours = torch.cat([result.model(part).argmax(1) for part in weak.split(500)])
    theirs = torch.cat([teacher.model(part).argmax(1) for part in weak.split(500)])
print(f"certificate: {report.top1_agreement_low:.0%} to {report.top1_agreement_high:.0%}")
print(f"truth, images of the same kind: {users[-1][3]:.1%}")
print(f"truth, a third of the contrast: {(ours == theirs).float().mean():.1%}")

# %% [markdown]
# Nor does it know whether the *teacher* is right: it compares the two networks. `--labelled DIR` measures both
# against labels. [Read a certificate](../how_to/certificate.md) has the rest.
