"""Tiny networks that carry their own answers: input size, expected seam, widths that can be cut, and MACs by hand."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


class Tiny(nn.Module):
    """size: (C, H, W) of the input. seam: the expected points. free: group -> units that a plan may cut.
    macs: of one image, head included. head: names of its tensors."""

    size = (3, 8, 8)
    seam: str
    free: dict[str, int]
    macs: int
    head: tuple[str, ...] = ("fc.weight", "fc.bias")

    def example(self) -> torch.Tensor:
        return torch.zeros(2, *self.size)


class Chain(Tiny):
    seam, free = "body:output", {"body.0": 8, "body.3": 12}
    macs = 64 * (8 * 3 * 9 + 12 * 8 * 9 + 16 * 12) + 16 * 5

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
            nn.Conv2d(12, 16, 1), nn.ReLU(),
        )  # fmt: skip
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.pool(self.body(x)).flatten(1))


class Block(nn.Module):
    def __init__(self, inputs, width, inner, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride != 1 or inputs != width:
            self.down = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.down is None else self.down(x)))


class Residual(Tiny):
    seam = "stage2:output"
    free = {
        "stem": 8,
        "stage1.0.conv1": 6,
        "stage1.1.conv1": 6,
        "stage1.2.conv1": 6,
        "stage2.0.conv1": 10,
        "stage2.1.conv1": 10,
    }
    macs = 64 * 9 * (3 * 8 + 3 * 2 * 8 * 6) + 16 * (9 * (8 * 10 + 10 * 16) + 8 * 16) + 16 * 9 * 2 * 10 * 16 + 16 * 5

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stage1 = nn.Sequential(Block(8, 8, 6), Block(8, 8, 6), Block(8, 8, 6))
        self.stage2 = nn.Sequential(Block(8, 16, 10, 2), Block(16, 16, 10))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(torch.flatten(self.pool(self.stage2(self.stage1(F.relu(self.stem(x))))), 1))


class Concat(Tiny):
    """A dense block: what is concatenated is cut by each maker on its own."""

    seam, free = "last:output", {"a": 6, "b": 4, "c": 5}
    macs = 64 * (3 * 6 * 9 + 6 * 4 * 9 + 10 * 5 * 9 + 15 * 8) + 8 * 5

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.bn, self.c = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 3, padding=1)
        self.last = nn.Conv2d(15, 8, 1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = torch.cat([x, self.b(x)], 1)
        x = torch.cat([x, self.c(F.relu(self.bn(x)))], 1)
        return self.fc(self.pool(self.last(x)).flatten(1))


class Depthwise(Tiny):
    """An inverted residual with squeeze-excite: expansion and depthwise channels are one group."""

    seam, free = "head_in:output", {"stem": 6, "expand": 12, "squeeze": 3}
    macs = 64 * (3 * 6 * 9 + 6 * 12 + 12 * 9 + 12 * 6 + 6 * 10) + 12 * 3 * 2 + 10 * 5

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.expand, self.bn1 = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depth, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.project = nn.Conv2d(12, 6, 1)
        self.head_in = nn.Conv2d(6, 10, 1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(10, 5)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        y = F.hardswish(self.bn2(self.depth(F.relu6(self.bn1(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.fc(self.pool(self.head_in(x + self.project(y))).flatten(1))


class Grouped(Tiny):
    """Grouped convolution and group norm: whole groups go."""

    seam, free = "last:output", {"reduce": 4, "norm_in": 3}
    macs = 64 * (3 * 12 * 9 + 12 * 3 * 9 + 12 * 9 + 9 * 8) + 8 * 5

    def __init__(self):
        super().__init__()
        self.reduce, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=4)
        self.norm_in, self.norm = nn.Conv2d(12, 9, 1), nn.GroupNorm(3, 9)
        self.last = nn.Conv2d(9, 8, 1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.gelu(self.grouped(F.relu(self.bn(self.reduce(x)))))
        return self.fc(self.pool(self.last(F.silu(self.norm(self.norm_in(x))))).flatten(1))


class Shared(Tiny):
    """One convolution used twice, and two that share one weight."""

    seam, free = "join:output", {"stem": 8, "inner": 6}
    macs = 64 * 9 * (3 * 8 + 2 * 8 * 8 + 2 * (8 * 6)) + 64 * 2 * 6 * 7 + 7 * 5

    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.act = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.inner, self.tied = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.tied.weight = self.inner.weight
        self.last, self.join = nn.Conv2d(6, 7, 1), nn.Tanh()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(7, 5)

    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.act(self.twice(self.act(self.twice(x))))
        a, b = self.last(self.inner(x)), self.last(self.tied(x))
        return self.fc(self.pool(self.join(F.relu(a) + F.relu(b))).flatten(1))


class FunctionalPool(Tiny):
    """Activation and pooling are functional and the map is overwritten in place behind the features."""

    seam, free = "bn:output", {"a": 8}
    macs = 64 * 9 * (3 * 8 + 8 * 10) + 10 * 5

    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.b(F.relu(self.a(x)))), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1))


class NoNorm(Tiny):
    """No norm and no pooling: the seam is what the last layer takes."""

    seam, free = "fc:input", {"a": 6, "b": 4}
    macs = 64 * 9 * 3 * 6 + 16 * 9 * 6 * 4 + 64 * 20 + 20 * 5

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.hidden, self.fc = nn.Linear(64, 20), nn.Linear(20, 5)

    def forward(self, x):
        x = F.max_pool2d(F.leaky_relu(self.a(x)), 2)
        x = F.elu(self.b(x))
        return self.fc(torch.tanh(self.hidden(x.flatten(1))))


class ConvAfterPool(Tiny):
    seam, free = "body:output", {"body.0": 8}
    macs = 64 * 9 * (3 * 8 + 8 * 12) + 12 * 20 + 20 * 5
    head = ("conv_head.weight", "conv_head.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
            "norm.num_batches_tracked", "fc.weight", "fc.bias")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.conv_head, self.norm, self.fc = nn.Conv2d(12, 20, 1), nn.BatchNorm2d(20), nn.Linear(20, 5)

    def forward(self, x):
        return self.fc(F.hardswish(self.norm(self.conv_head(self.body(x).mean((2, 3), keepdim=True)))).flatten(1))


class Attributes(Tiny):
    """Sizes that live in attributes (a split, a slice), one that is computed, and one written into the code."""

    seam, free = "last:output", {"wide": 5, "inner": 5, "computed": 4, "sliced": 7, "fixed": 6}
    macs = 64 * (3 * 10 * 9 + 5 * 5 * 9 + 10 * 8 + 8 * 7 + 5 * 6 + 6 * 9) + 9 * 5

    def __init__(self):
        super().__init__()
        self.width, self.kept = 5, 5
        self.wide, self.inner = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1)
        self.computed = nn.Conv2d(10, 8, 1)
        self.sliced = nn.Conv2d(8, 7, 1)
        self.fixed = nn.Conv2d(5, 6, 1)
        self.last = nn.Conv2d(6, 9, 1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(9, 5)

    def forward(self, x):
        a, b = torch.split(F.relu(self.wide(x)), self.width, 1)
        x = self.computed(torch.cat([self.inner(a), b], 1))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)  # a channel shuffle
        x = self.sliced(F.relu(x))[:, : self.kept]
        x = self.fixed(x).view(-1, 6, h, w)  # the 6 is a literal
        return self.fc(self.pool(self.last(F.relu(x))).flatten(1))


class Attention(Tiny):
    """A small token mixer with a layer norm; how many heads there are is written into the code."""

    size, seam, free = (3, 8, 8), "norm:output", {"qkv": 2, "mlp.0": 14}
    macs = 4 * (3 * 16 * 12) + 4 * 12 * 36 + 2 * 2 * (4 * 4 * 6) + 4 * 12 * 12 + 4 * (12 * 14 * 2) + 12 * 5

    def __init__(self):
        super().__init__()
        self.patch, self.norm1 = nn.Conv2d(3, 12, 4, 4), nn.LayerNorm(12)
        self.position = nn.Parameter(torch.randn(1, 4, 12))
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.norm2, self.mlp = nn.LayerNorm(12), nn.Sequential(nn.Linear(12, 14), nn.GELU(), nn.Linear(14, 12))
        self.norm, self.fc = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        n, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, 2, 6).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) / 6**0.5).softmax(-1) @ v
        x = x + self.proj(y.transpose(1, 2).reshape(n, tokens, 12))
        x = x + self.mlp(self.norm2(x))
        return self.fc(self.norm(x).mean(1))


class LayerNorms(Tiny):
    """ConvNeXt-like: a layer norm over channels that can be cut, and a layer scale."""

    seam, free = "last:output", {"stem": 8, "pw1": 20}
    macs = 64 * (3 * 8 + 8 * 9 + 8 * 20 * 2 + 8 * 6) + 6 * 5

    def __init__(self):
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.pw1, self.pw2 = nn.LayerNorm(8), nn.Linear(8, 20), nn.Linear(20, 8)
        self.gamma = nn.Parameter(torch.full((8,), 1e-6))
        self.last, self.pool, self.fc = nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.pw2(F.gelu(self.pw1(self.norm(self.depth(x).permute(0, 2, 3, 1)))))
        x = x + (self.gamma * y).permute(0, 3, 1, 2)
        return self.fc(self.pool(self.last(x)).flatten(1))


class Mixer(Tiny):
    """Patches, one residual attention of a subclass, one norm, mean over the tokens: 4 tokens of width 12."""

    size, seam = (3, 8, 8), "norm:output"
    heads: int
    patch_macs = 4 * (3 * 16 * 12) + 12 * 5

    def __init__(self):
        super().__init__()
        self.patch, self.before = nn.Conv2d(3, 12, 4, 4), nn.LayerNorm(12)
        self.norm, self.fc = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attend(self.before(x))
        return self.fc(self.norm(x).mean(1))


class FusedHeads(Mixer):
    """Three heads of width 4 from one layer, with a table of position biases; sizes live in attributes."""

    free = {"qkv": 3}
    macs = Mixer.patch_macs + 4 * 12 * 36 + 2 * 3 * (4 * 4 * 4) + 4 * 12 * 12

    def __init__(self):
        super().__init__()
        self.heads, self.inner = 3, 12
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.table = nn.Parameter(torch.randn(7, 3))
        self.register_buffer("places", torch.arange(4)[:, None] - torch.arange(4) + 3)

    def attend(self, x):
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.places.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        y = (q @ k.transpose(-2, -1) / 2.0 + bias.unsqueeze(0)).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, tokens, self.inner))


class HandWritten(Mixer):
    """Heads as most code has them: how wide they are, and what they are merged to, come from the width of the input."""

    free = {"qkv": 3}
    macs = Mixer.patch_macs + 4 * 12 * 36 + 2 * 3 * (4 * 4 * 4) + 4 * 12 * 12

    def __init__(self):
        super().__init__()
        self.heads = 3
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def attend(self, x):
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, q.new_zeros(1, self.heads, tokens, tokens))
        return self.proj(y.transpose(1, 2).reshape(n, tokens, width))


class GroupedQuery(Mixer):
    """Four query heads of width 3 share two key heads: whole groups go."""

    free = {"k": 2}
    macs = Mixer.patch_macs + 4 * 12 * (12 + 6 + 6) + 2 * 4 * (4 * 4 * 3) + 4 * 12 * 12

    def __init__(self):
        super().__init__()
        self.heads, self.groups = 4, 2
        self.k, self.v, self.q = nn.Linear(12, 6), nn.Linear(12, 6), nn.Linear(12, 12)
        self.proj = nn.Linear(12, 12)

    def attend(self, x):
        n, tokens, _ = x.shape
        k, v = (layer(x).view(n, tokens, self.groups, -1).transpose(1, 2) for layer in (self.k, self.v))
        q = self.q(x).view(n, tokens, self.heads, -1).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class TalkingHeads(Mixer):
    """Heads that are mixed before the softmax, products as einsum, a gated MLP behind."""

    free = {"qk": 3, "v": 2, "gate": 5}  # talk makes the heads of v
    macs = Mixer.patch_macs + 4 * 12 * (24 + 8) + 3 * 64 + 16 * 3 * 2 + 2 * 64 + 4 * 8 * 12 + 4 * (12 * 10 + 5 * 12)

    def __init__(self):
        super().__init__()
        self.heads, self.talked = 3, 2
        self.qk, self.v, self.proj = nn.Linear(12, 24), nn.Linear(12, 8), nn.Linear(8, 12)
        self.talk = nn.Linear(3, 2)
        self.gate, self.out = nn.Linear(12, 10), nn.Linear(5, 12)

    def attend(self, x):
        n, tokens, _ = x.shape
        q, k = self.qk(x).view(n, tokens, 2, self.heads, 4).unbind(2)
        v = self.v(x).view(n, tokens, self.talked, 4)
        scores = self.talk(torch.einsum("nqhd,nkhd->nqkh", q, k)).softmax(2)
        y = self.proj(torch.einsum("nqkh,nkhd->nqhd", scores, v).flatten(2))
        return y + self.out(F.glu(self.gate(y)))


class Branches(Tiny):
    """Two branches of tokens that see each other once, each with its norm and its head; the scores are averaged."""

    seam, free = "norms.0:output norms.1:output", {"hidden.0": 30, "hidden.1": 40}
    head = ("heads.0.weight", "heads.0.bias", "heads.1.weight", "heads.1.bias")
    macs = 4 * 48 * 12 + 16 * 12 * 10 + 12 * 10 + 4 * 12 * 30 * 2 + 16 * 10 * 40 * 2 + 12 * 5 + 10 * 5

    def __init__(self):
        super().__init__()
        self.patches = nn.ModuleList([nn.Conv2d(3, 12, 4, 4), nn.Conv2d(3, 10, 2, 2)])
        self.cross = nn.Linear(12, 10)
        self.hidden = nn.ModuleList([nn.Linear(12, 30), nn.Linear(10, 40)])
        self.out = nn.ModuleList([nn.Linear(30, 12), nn.Linear(40, 10)])
        self.norms = nn.ModuleList([nn.LayerNorm(12), nn.LayerNorm(10)])
        self.heads = nn.ModuleList([nn.Linear(12, 5), nn.Linear(10, 5)])

    def forward(self, x):
        a, b = (patch(x).flatten(2).transpose(1, 2) for patch in self.patches)
        b = b + self.cross(a.mean(1, keepdim=True))
        a, b = (x + out(F.gelu(inner(x))) for x, inner, out in zip((a, b), self.hidden, self.out, strict=True))
        scores = [h(n(x)[:, 0]) for x, n, h in zip((a, b), self.norms, self.heads, strict=True)]
        return torch.stack(scores).mean(0)


class ConvClassifier(Tiny):
    """The classifier is a convolution before the pooling."""

    seam, free, head = "body:output", {"body.0": 8}, ("classifier.0.weight", "classifier.0.bias")
    macs = 64 * (3 * 8 * 9 + 8 * 12 * 9 + 12 * 5)

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU())
        self.classifier = nn.Sequential(nn.Conv2d(12, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x):
        return self.classifier(self.body(x)).flatten(1)


NETS = [
    Chain, Residual, Concat, Depthwise, Grouped, Shared, FunctionalPool, NoNorm, ConvAfterPool, Attributes, Attention,
    LayerNorms, FusedHeads, HandWritten, GroupedQuery, TalkingHeads, Branches, ConvClassifier,
]  # fmt: skip


class Maps(nn.Module):
    """A backbone: two maps of different sizes in a dict, the second made from the first."""

    def __init__(self):
        super().__init__()
        self.stem, self.low = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.inner, self.high = nn.Conv2d(8, 10, 3, 2, 1), nn.Conv2d(10, 12, 3, padding=1)

    def forward(self, x):
        low = F.relu(self.low(F.relu(self.stem(x))))
        return {"low": low, "high": F.relu(self.high(F.relu(self.inner(low))))}


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.high = nn.Conv2d(8, 5, 1), nn.Conv2d(12, 5, 1)

    def forward(self, maps):
        return self.low(maps["low"]) + F.interpolate(self.high(maps["high"]), scale_factor=2.0)


class Segmenter(nn.Module):
    """Takes its images by name and returns a dict: its classifier reads two maps out of a dict."""

    def __init__(self):
        super().__init__()
        self.backbone, self.classifier = Maps(), Dense()

    def forward(self, *, pixel_values, sharp=False):
        return {"out": self.classifier(self.backbone(pixel_values * (2.0 if sharp else 1.0))), "size": 8}


@dataclass
class Output:
    scores: torch.Tensor
    features: torch.Tensor


class Structured(Chain):
    """Returns a dataclass that torch knows nothing of: scores, and the features that they were made from."""

    def forward(self, x):
        x = self.body(x)
        return Output(self.fc(self.pool(x).flatten(1)), x)


class Headless(Residual):
    """Pooled features and nothing behind them."""

    head = ()

    def __init__(self):
        super().__init__()
        del self.fc

    def forward(self, x):
        return self.pool(self.stage2(self.stage1(F.relu(self.stem(x))))).flatten(1)


class Halves(Tiny):
    """Attention whose module returns a tuple, then an MLP in the block's own code, both around skips."""

    size, seam, free, macs = (3, 8, 8), "norm:output", {}, 0

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.attn = nn.LayerNorm(12), nn.MultiheadAttention(12, 3, batch_first=True)
            self.after, self.one, self.two = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)
            self.scale = nn.Parameter(torch.rand(12))

        def forward(self, x):
            y = self.before(x)
            x = x + self.scale * self.attn(y, y, y, need_weights=False)[0]
            y = F.gelu(self.one(self.after(x)))
            return x + self.two(y)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 4, 4)
        self.blocks = nn.Sequential(self.Half(), self.Half())
        self.norm, self.fc = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2)))
        return self.fc(x.mean(1))


class Encoder(Mixer):
    """torch's own encoder layer, whose fused path reads its sizes off attributes that a cut does not change."""

    free = {"layer.self_attn": 3, "layer.linear1": 14}

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 3, 14, batch_first=True)

    def attend(self, x):
        return self.layer(x)


class Boxed(nn.Module):
    """Its output's shape depends on what it sees, so the whole cannot be traced."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = Residual(), nn.Linear(5, 5)

    def forward(self, x):
        scores = self.scale(self.body(x))
        return scores[scores > 0].tolist()


class Boxes(nn.Module):
    """A detector's head over maps of two sizes: four sides, each the mean of BINS bins, and a score for each class."""

    BINS, CLASSES, STRIDES = 4, 3, (2, 4)

    def __init__(self, widths, masks=False, final=False):
        super().__init__()
        self.sides = nn.ModuleList(nn.Sequential(nn.Conv2d(w, 4 * self.BINS, 1)) for w in widths)
        self.classes = nn.ModuleList(
            nn.Sequential(nn.Conv2d(w, w, 1), nn.ReLU(), nn.Conv2d(w, self.CLASSES, 1)) for w in widths
        )
        self.bins = nn.Conv2d(self.BINS, 1, 1, bias=False)
        self.masks = nn.Sequential(nn.Conv2d(widths[0], 4, 1), nn.BatchNorm2d(4), nn.ReLU()) if masks else None
        self.final = final

    def forward(self, maps):
        n = len(maps[0])
        sides = torch.cat([m(x).view(n, 4 * self.BINS, -1) for m, x in zip(self.sides, maps, strict=True)], 2)
        scores = torch.cat([m(x).view(n, self.CLASSES, -1) for m, x in zip(self.classes, maps, strict=True)], 2)
        at, strides = [], []
        for x, stride in zip(maps, self.STRIDES, strict=True):
            across = torch.arange(x.shape[3]).type_as(x) + 0.5
            down = torch.arange(x.shape[2]).type_as(x) + 0.5
            at.append(torch.stack(torch.meshgrid(across, down, indexing="xy")).view(2, -1))
            strides.append(x.new_full((1, x.shape[2] * x.shape[3]), stride))
        at, strides = torch.cat(at, 1), torch.cat(strides, 1)
        near, far = self.bins(sides.view(n, 4, self.BINS, -1).transpose(1, 2).softmax(1)).view(n, 4, -1).chunk(2, 1)
        first, last = at - near.abs(), at + far.abs()
        if self.final:
            best, label = scores.sigmoid().max(1)
            found = torch.cat([first * strides, last * strides, best[:, None], label[:, None].type_as(best)], 1)
            order = best.topk(10, 1)[1]
            found = found.transpose(1, 2).gather(1, order[..., None].expand(-1, -1, 6))
        else:
            found = torch.cat([(first + last) / 2 * strides, (last - first) * strides, scores.sigmoid()], 1)
        if self.masks is not None:
            found = (found, self.masks(maps[0]))
        return found, {"boxes": sides, "scores": scores, "feats": maps}


class Detector(nn.Module):
    """Returns boxes, and beside them the maps that its head takes. It has no class of its own for its outputs."""

    def __init__(self, **head):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.low = nn.Sequential(nn.Conv2d(16, 32, 3, 1, 1), nn.ReLU(), nn.Conv2d(32, 8, 3, 1, 1), nn.ReLU())
        self.high = nn.Sequential(nn.Conv2d(8, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 12, 3, 1, 1), nn.ReLU())
        self.head = Boxes((8, 12), **head)

    def forward(self, x):
        low = self.low(self.stem(x))
        return self.head([low, self.high(low)])
