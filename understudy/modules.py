"""Stand-ins for torch's own modules whose code takes for granted that nothing was cut from them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiheadAttention(nn.MultiheadAttention):
    """torch's, but its heads need not fill its width: there are `num_heads` of them, of `head_dim` channels each."""

    # torch's fused paths, which read every size off embed_dim, are taken only where this is true.
    _qkv_same_embed_dim = property(lambda self: False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        one = query.dim() == 2
        given = [t.unsqueeze(0) if one else t if self.batch_first else t.transpose(0, 1) for t in (query, key, value)]
        same = query is key is value
        q, k, v = (
            t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in self._projected(given, same)
        )
        mask = _mask(attn_mask, q)
        if mask is not None and mask.dim() == 3:  # one for each image and head
            mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _mask(key_padding_mask.unsqueeze(0) if one else key_padding_mask, q)[:, None, None]
            mask = padding if mask is None else mask + padding
        dropout, scale, weights = self.dropout if self.training else 0.0, self.head_dim**-0.5, None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * scale
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = F.dropout(weights, dropout)
            found = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if one else weights
        else:
            found = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)
        found = self.out_proj(found.transpose(1, 2).flatten(2))
        return found[0] if one else found if self.batch_first else found.transpose(0, 1), weights

    def _projected(self, given: list[Tensor], same: bool) -> tuple[Tensor, ...]:
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if same:
            return F.linear(given[0], weight, bias).chunk(3, -1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip(given, weight.chunk(3), biases, strict=True))


def _mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to the scores: a boolean mask is true where attention is not allowed."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))


def stands_in(module: nn.Module) -> bool:
    """Whether `module` is torch's own and there is a stand-in that computes the same."""
    plain = type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim
    return plain and module.bias_k is None and not module.add_zero_attn


def replace_own(model: nn.Module, names: set[str] | None = None) -> None:
    """Make stand-ins of torch's own modules in `model`, in place: of the named ones, or of all."""
    for name, module in model.named_modules():
        if stands_in(module) and (names is None or name in names):
            module.__class__ = MultiheadAttention
