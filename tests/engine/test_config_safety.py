"""A config can name no code to run, on any way into the training tool, and says which keys were meant."""

import pytest

BASE = "_BASE_: {}\nSOLVER:\n  MAX_ITER: 1\n"


def tool_says(train_net, capsys, *arguments, **options):
    """(exit code, the tool's last line, the number of its lines that are errors)."""
    code = train_net(*arguments, **options)
    lines = [line for line in "".join(capsys.readouterr()).splitlines() if "halodet]: " in line]
    return code, lines[-1].partition("halodet]: ")[2], len(lines)


@pytest.fixture
def unsafe(tmp_path):
    """A config that would make a folder, and that folder."""
    target = tmp_path / "made-by-the-config"
    path = tmp_path / "unsafe.yaml"
    path.write_text(f"MODEL:\n  WEIGHTS: !!python/object/apply:os.mkdir ['{target}']\n")
    return path, target


@pytest.mark.parametrize("way", ["file", "base", "list of bases", "config.yaml of the run", "override"])
def test_nothing_in_a_config_is_run(tmp_path, train_net, capsys, unsafe, way):
    path, target = unsafe
    output, opts, flags = tmp_path / "out", [], []
    child = tmp_path / "child.yaml"
    if way in ("base", "list of bases"):
        child.write_text(BASE.format(path.name if way == "base" else f"[{path.name}]"))
        path = child
    elif way == "config.yaml of the run":
        output.mkdir()
        path, flags = path.rename(output / "config.yaml"), ["--resume"]
    elif way == "override":
        child.write_text("SOLVER:\n  MAX_ITER: 1\n")
        path, opts = child, ["SOLVER.MAX_ITER", f"__import__('os').mkdir('{target}')"]
    code, line, count = tool_says(train_net, capsys, output, *opts, flags=flags, config=path)
    assert code == 2 and count == 1 and not target.exists()
    assert ("is not a plain YAML config" in line and "python/object/apply:os.mkdir" in line) or "Type mismatch" in line


@pytest.mark.parametrize(
    ("text", "opts", "message"),
    [
        ("SOLVER:\n  MAX_ITERS: 3\n", [], "there is no config key SOLVER.MAX_ITERS: the nearest are SOLVER.MAX_ITER, "),
        ("SOLVER:\n  MAX_ITER: 3\n", ["MODEL.EMA.ENABELD", "True"], "no config key MODEL.EMA.ENABELD: the nearest are MODEL.EMA.ENABLED"),
    ],
)
def test_a_misspelt_key_names_its_neighbours(tmp_path, train_net, capsys, text, opts, message):
    path = tmp_path / "typo.yaml"
    path.write_text(text)
    code, line, count = tool_says(train_net, capsys, tmp_path / "out", *opts, config=path)
    assert code == 2 and count == 1 and message in line
