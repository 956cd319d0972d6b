"""Tests of the generated config reference."""

from halodet.config import add_halodet_config

from detectron2.config import CfgNode, get_cfg
from helpers import load_tool


def leaves(node: CfgNode, prefix: str = "") -> set[str]:
    found = set()
    for key, value in node.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else {prefix + key}
    return found


def test_committed_page_is_current():
    tool = load_tool("config_reference")
    assert tool.PAGE.read_text(encoding="utf-8") == tool.render(), "run python tools/config_reference.py"


def test_every_key_has_a_comment():
    cfg = get_cfg()
    before = leaves(cfg)
    add_halodet_config(cfg)
    comments = load_tool("config_reference").comments()
    assert leaves(cfg) - before <= set(comments)
    assert all(comments.values())
