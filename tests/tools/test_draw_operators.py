"""The pixels that tools/draw_operators.py finds a mixer to depend on."""

import pytest
from helpers import load_tool

tool = load_tool("draw_operators")


@pytest.mark.parametrize(("name", "rows", "columns"), [("conv", (9, 12), (12, 15)), ("halo", (5, 19), (5, 19))])
def test_influence_is_the_window(name, rows, columns):
    seen = tool.influence(name, samples=2) > 0
    expected = seen.new_zeros(seen.shape)
    expected[slice(*rows), slice(*columns)] = True
    assert (seen == expected).all()


def test_images_are_written(tmp_path, capsys):
    tool.main(["conv", "--output", str(tmp_path / "new")])
    assert (tmp_path / "new/conv.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        tool.main(["lambad", "--output", str(tmp_path)])
    assert "'lambad'" in capsys.readouterr().err
