"""VeRA against its formula, written out in NumPy and float64."""

import math
import zlib

import numpy as np
from block_oracles import WIDTH, adapted_vit, assert_same, block, drawn, merged_weights
from models import make

import medpeft


def reference_projection(rows, columns, seed):
    """VeRA's frozen matrices, from NumPy's generator without torch."""
    raw = np.random.Philox(key=zlib.crc32(f"{seed}:{rows}x{columns}".encode())).random_raw(rows * columns)
    unit = (raw >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    return (
        (unit.astype(np.float32) * np.float32(math.sqrt(6 / columns)))
        .astype(np.float64)
        .reshape(rows, columns)
    )


def test_vera_scales_frozen_random_matrices_in_queries_and_values():
    model, base = adapted_vit("vera", rank=6, projection_seed=3)
    adapter = model.blocks[0].attn.qkv.adapters.vera
    d, b = adapter.d.detach().numpy().reshape(2, 6), adapter.b.detach().numpy().reshape(2, WIDTH)
    A, B = reference_projection(6, WIDTH, 3), reference_projection(WIDTH, 6, 3)
    change = [np.diag(b[i]) @ B @ np.diag(d[i]) @ A for i in range(2)]

    expected = base["attn.qkv.weight"] + np.concatenate([change[0], np.zeros_like(change[0]), change[1]])
    assert_same(merged_weights(model)["blocks.0.attn.qkv.weight"], expected)
    x = drawn(2, 5, WIDTH)
    assert_same(model.blocks[0](x), block(x.numpy(), {**base, "attn.qkv.weight": expected}))


def test_veras_matrices_never_change():
    model = medpeft.apply(make("vit"), "vera", rank=6)
    matrix = model.blocks[0].attn.qkv.adapters.vera.down.matrix

    # As drawn when the method was first published: a file of then must still mean the same, on any machine.
    assert [value.hex() for value in matrix[0, :3].tolist()] == [
        *("-0x1.6e5ed00000000p-3", "0x1.a3b6600000000p-2", "0x1.2315ec0000000p-2"),
    ]
    assert matrix.abs().max() <= math.sqrt(6 / WIDTH)
    assert abs(matrix.std() - math.sqrt(2 / WIDTH)) < 0.05
