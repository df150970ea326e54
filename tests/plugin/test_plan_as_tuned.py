"""What the tuner scores is what the pool and the backend serve, layer by layer of a mixed plan."""

import torch
from paged_batch import HEAD_DIM, KV_HEADS, Q_HEADS, World

from kvtuner_sglang.quality import transformers_path as path
from kvtuner_sglang.tuner.menu import Menu
from kvtuner_sglang.tuner.scoring import recipes_of

PAGE, TOKENS = 64, 200
MENU = Menu(("2", "4s", "4", "4b", "8"), ("2s", "4s", "8s"), HEAD_DIM, PAGE)


def test_every_pair_of_the_menu_reads_back_what_is_served():
    world = World(MENU.pairs, PAGE)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(TOKENS, Q_HEADS, HEAD_DIM, generator=generator)
    k, v = (torch.randn(TOKENS, KV_HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    k[..., 5] = k[..., 5] * 20 + 30  # an outlier channel with an offset
    world.place(1, 0, TOKENS)
    served = world.forward_layers([(1, 0, TOKENS)], q, k, v)
    heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
    exact = path._attend(None, 0, *heads_first, HEAD_DIM**-0.5)  # noqa: SLF001 (one layer of the path, alone)
    for index, (recipe, theirs) in enumerate(zip(recipes_of(MENU.pairs, PAGE), served, strict=True)):
        ours = path._attend(recipe, index, *heads_first, HEAD_DIM**-0.5)  # noqa: SLF001
        theirs = theirs.view(TOKENS, Q_HEADS, HEAD_DIM).transpose(0, 1)[None]
        assert torch.allclose(ours, theirs, atol=2e-5), MENU.pairs[index]
        lost = (ours - exact).square().mean()
        assert lost > 25 * (ours - theirs).square().mean(), MENU.pairs[index]
