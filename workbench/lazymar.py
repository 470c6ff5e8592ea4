"""Attention caching between the iterations of a generation, after LazyMAR (2503.12450).

From one iteration to the next most tokens hardly change. Between two refreshes only two kinds of
tokens are computed: those just revealed, which are new to the encoder, and those about to be
revealed. They attend to the keys and values that are kept of all other tokens, and these miss only
what the new tokens would have changed in them.

    generate(model, labels, Sampling(contexts=partial(LazyContexts, every=4)))

Differs from the paper: it also computes the `buffer` rows of the class in every iteration, and
takes c_null - c from the last refresh. Here the rows of the class are computed at a refresh alone,
and c_null is computed whenever c is.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from maskrl import MAR, Attention, Block, Contexts, gather_rows, true_first
from workbench.errors import InputError
from workbench.precision import in_precision_of

WARM_UP = 3  # iterations at the start, when each token changes most, that compute everything


def is_refresh(k: int, every: int) -> bool:
    """Whether iteration k = 0, 1, ... computes everything."""
    return k < WARM_UP or k % every == 0


class LazyContexts(Contexts):
    """Contexts that compute everything in the first iterations and in every `every`-th alone.

    every: 1 is exact. A learned schedule looks at the contexts of the iteration before. Images that
    were finished at the last refresh are left out, and have zeros. InputError if every is below 1.
    """

    def __init__(self, model: MAR, labels: Tensor, guided: bool, every: int = 8):
        super().__init__(model, labels, guided)
        if every < 1:
            raise InputError(f"--refresh {every} must be at least 1, which is exact")
        self.every = every

    def before(
        self, k: int, tokens: Tensor, mask: Tensor, hidden: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """c and, under guidance, c_null [B, L, W] of tokens [B, L, D] under mask [B, L].

        They are those of iteration k at a refresh, else those of the iteration before."""
        self.tokens, self.mask = tokens, mask
        self.refreshed = is_refresh(k, self.every)
        if self.refreshed:
            self.live = mask.any(1).nonzero()[:, 0]
            self.cache = RowCache(self.model.settings.buffer + self.model.length)
            self.now = self.compute(torch.ones_like(self.model.visible(mask)))
        return self.now

    def after(self, reveal: Tensor) -> tuple[Tensor, Tensor | None]:
        """c and c_null, up to date for the tokens that are revealed next, reveal [B, L]."""
        if not self.refreshed:
            wanted = self.just_revealed | reveal
            self.now = self.compute(F.pad(wanted, (self.model.settings.buffer, 0)))
        self.just_revealed = reveal
        return self.now

    def compute(self, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        """c and c_null of the live images, the rows wanted [B, buffer + L] as they are now."""
        model, live = self.model, self.live
        labels = self.labels[live]
        copies = 2 if self.guided else 1  # for the class and for the null class, in one batch
        contexts = lazy_context(
            model,
            self.tokens[live].repeat(copies, 1, 1),
            self.mask[live].repeat(copies, 1),
            torch.cat([labels, model.null(labels)]) if self.guided else labels,
            wanted[live].repeat(copies, 1),
            self.cache,
        )
        of_all = contexts.new_zeros(copies, *self.mask.shape, contexts.shape[-1])
        of_all[:, live] = contexts.unflatten(0, (copies, -1))
        return of_all[0], of_all[1] if self.guided else None


class RowCache:
    """What each layer gave at the N = buffer + L rows of the sequence when they were last computed.

    Only the rows `selected` [B, n] are being computed."""

    def __init__(self, length: int):
        self.length, self.selected, self.kept = length, None, {}

    def select(self, wanted: Tensor) -> Tensor:
        """The rows [B, n] where wanted [B, N]; an image with fewer than others repeats its last."""
        count = wanted.sum(1, keepdim=True)
        column = torch.arange(int(count.max()), device=wanted.device)
        column = torch.minimum(column, (count - 1).clamp(min=0))
        self.selected = true_first(wanted).gather(1, column)
        return self.selected

    def update(self, layer, x: Tensor) -> Tensor:
        """Keep x [B, n, W] of the selected rows; returns what is kept of the layer [B, N, W]."""
        if layer not in self.kept:
            self.kept[layer] = x.new_zeros(len(x), self.length, x.shape[-1])
        return self.kept[layer].scatter_(1, self.selected[..., None].expand_as(x), x)


def lazy_context(model: MAR, tokens, mask, labels, wanted: Tensor, cache: RowCache) -> Tensor:
    """`MAR.context`, c [B, L, W], in which only the rows wanted [B, buffer + L] are computed.

    All others are as the cache has them. An empty cache needs everything to be wanted. The
    precision is that of `model.context`."""
    with in_precision_of(model):
        visible = model.visible(mask)
        x = gather_rows(model.encoder_input(tokens, labels), cache.select(visible & wanted))
        for block in model.encoder_blocks:
            x = lazy_block(block, x, visible, cache)
        encoded = cache.update("encoder", model.decoder_embed(model.encoder_norm(x)))
        x = gather_rows(model.decoder_input(encoded, visible), cache.select(wanted))
        for block in model.decoder_blocks:
            x = lazy_block(block, x, None, cache)
        return model.decoder_output(cache.update("decoder", model.decoder_norm(x))).float()


def lazy_block(block: Block, x: Tensor, keys: Tensor | None, cache: RowCache) -> Tensor:
    """The Block for the selected rows x [B, n, W]."""
    x = x + lazy_attention(block.attn, block.norm1(x), keys, cache)
    return x + block.mlp(block.norm2(x))


def lazy_attention(attn: Attention, x: Tensor, keys: Tensor | None, cache: RowCache) -> Tensor:
    """The selected rows x [B, n, W] attend to all N rows of the cache where keys [B, N] is true."""
    width = x.shape[-1]
    q, kv = attn.qkv(x).split([width, 2 * width], -1)
    kv = cache.update(attn, kv)  # [B, N, 2W]
    q = rearrange(q, "b n (h d) -> b h n d", h=attn.heads)
    k, v = rearrange(kv, "b n (two h d) -> two b h n d", two=2, h=attn.heads)
    attn_mask = None if keys is None else keys[:, None, None, :]
    x = F.scaled_dot_product_attention(q, k, v, attn_mask)
    return attn.proj(rearrange(x, "b h n d -> b n (h d)"))
