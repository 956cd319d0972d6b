"""Relative position tables resized to another block or halo size: every offset keeps its row."""

from halodet.mixers.halo import HaloMixer
from halodet.mixers.rel_pos import KNOWN, infer_block_and_halo, resize_table
from halodet.models import VARIANTS

import pytest
import torch

SIZES = [((4, 1), (4, 3)), ((4, 3), (4, 1)), ((4, 3), (8, 3)), ((8, 2), (4, 2)), ((8, 3), (6, 4)), ((3, 0), (5, 2))]


def rows_by_offset(block, halo):
    """Row read for each offset of a key to its query, by walking over all queries of a block and keys of its window."""
    window = block + 2 * halo
    rows = {}
    for query in range(block):
        for key in range(window):
            offset = (key - halo) - query  # both counted from the block's first pixel
            assert rows.setdefault(offset, window - 1 + key - query) == window - 1 + key - query
    return rows


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_every_offset_keeps_its_row_and_new_ones_take_the_nearest(old, new):
    before, after = rows_by_offset(*old), rows_by_offset(*new)
    table = torch.randn(2 * (old[0] + 2 * old[1]) - 1, 5)
    resized = resize_table(table, old, new)
    assert resized.shape == (2 * (new[0] + 2 * new[1]) - 1, 5)
    for offset, row in after.items():
        nearest = min(before, key=lambda known: abs(known - offset))
        assert torch.equal(resized[row], table[before[nearest]]), offset
    assert torch.equal(resize_table(table, old, old)[min(before.values()) :], table[min(before.values()) :])


@pytest.mark.parametrize(
    ("old", "new", "side"),
    [((4, 1), (4, 3), 4), ((4, 3), (4, 1), 4), ((4, 3), (8, 3), 4), ((4, 4), (8, 2), 8), ((8, 3), (4, 4), 8)],
)
def test_attention_gives_the_same_where_both_see_the_whole_map(old, new, side):
    """Both windows cover the whole small map and keys outside it are masked, so that only the tables can differ."""
    torch.manual_seed(0)
    made = dict(num_heads=2, border="mask", backend="reference")
    source = HaloMixer(8, 8, block_size=old[0], halo_size=old[1], **made).double()
    goal = HaloMixer(8, 8, block_size=new[0], halo_size=new[1], **made).double()
    state = {name: resize_table(v, old, new) if "pos_embed" in name else v for name, v in source.state_dict().items()}
    goal.load_state_dict(state)
    x = torch.randn(2, 8, side, side, dtype=torch.float64)
    torch.testing.assert_close(goal(x), source(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        goal.pos_embed.height_rel.copy_(goal.pos_embed.height_rel.roll(1, 0))
    assert (goal(x) - source(x)).abs().max() > 1e-3, "a table off by one row must show"


def test_block_and_halo_of_a_file():
    assert infer_block_and_halo(27, (8, 3), {}) == (8, 3)
    assert infer_block_and_halo(27, (32, 3), {}) == (8, 3)  # same halo
    assert infer_block_and_halo(27, (8, 4), {}) == (8, 3)  # same block
    assert infer_block_and_halo(27, (12, 2), {}) == (8, 3)  # the only one known
    assert infer_block_and_halo(31, (10, 4), {}) == (10, 3)  # of three with this window, the one that shares the block
    assert infer_block_and_halo(21, (8, 3), {}) == (7, 2)  # timm's haloregnetz_b
    assert infer_block_and_halo(17, (4, 2), {}) == (5, 2)  # none known: the model's halo
    assert infer_block_and_halo(31, (10, 3), {"block_size": "12", "halo_size": "2"}) == (
        12,
        2,
    )  # what the file says comes first
    assert infer_block_and_halo(27, (10, 3), {"block_size": "12", "halo_size": "2"}) == (8, 3)  # unless it cannot be


def test_the_sizes_of_all_variants_are_known():
    assert {(variant.block_size, variant.halo_size) for variant in VARIANTS.values()} <= set(KNOWN)
