"""The public operation on the Triton back-end, prefill and decoding, in Triton's interpreter."""

import os

import pytest
import torch

from path_attn import PaTHKVCache, global_path_attention, path_attention

pytestmark = [
    pytest.mark.interpret,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 before import"
    ),
]


@pytest.mark.parametrize("gated", [False, True], ids=["path", "path-fox"])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (40, None), (None, 3.0)])
@pytest.mark.parametrize("padded", [False, True], ids=["dense", "left-padded"])
def test_prefill_and_decode_match_the_definition(gated, window, softcap, padded):
    generator = torch.Generator().manual_seed(0)
    batch, length, heads, dim, prompt = 2, 90, 2, 16, 70

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    q, k, v = normal(batch, length, 2 * heads, dim), *normal(2, batch, length, heads, dim)
    w = torch.nn.functional.normalize(normal(batch, length, heads, dim), dim=-1)
    beta = 2 * torch.rand(batch, length, heads, generator=generator)
    g = -torch.rand(batch, length, 2 * heads, generator=generator) * 0.2 if gated else None
    skipped = 9 if padded else 0
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, :skipped] = False
    tokens = [q, k, v, w, beta, g]

    cache = PaTHKVCache(keep_open=8)
    pieces = [slice(0, prompt), *(slice(t, t + 1) for t in range(prompt, length))]
    outs = [
        path_attention(
            *(None if x is None else x[:, piece] for x in tokens),
            attention_mask=mask[:, piece] if padded else None,
            window=window,
            softcap=softcap,
            cache=cache,
            backend="triton",
        )[0]
        for piece in pieces
    ]
    seen = torch.cat(outs, 1)
    for row, start in enumerate((0, skipped)):
        real = [None if x is None else x[row : row + 1, start:].double() for x in tokens]
        expected = global_path_attention(*real, window=window, softcap=softcap)
        # float32 sums of at most 96 terms of order 1
        torch.testing.assert_close(
            seen[row : row + 1, start:].double(), expected, atol=2e-5, rtol=0
        )
