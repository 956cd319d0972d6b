"""A config can name no code to run, on any way into the training tool, and says which keys were meant."""

from halodet.engine import load_config
from halodet.errors import ConfigError

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
    assert (
        "is not a plain YAML config" in line and "python/object/apply:os.mkdir" in line
    ) or "of type str, expected one of type int" in line


@pytest.mark.parametrize(
    ("text", "opts", "message"),
    [
        ("SOLVER:\n  MAX_ITERS: 3\n", [], "there is no config key SOLVER.MAX_ITERS: the nearest are SOLVER.MAX_ITER, "),
        (
            "SOLVER:\n  MAX_ITER: 3\n",
            ["MODEL.EMA.ENABELD", "True"],
            "no config key MODEL.EMA.ENABELD: the nearest are MODEL.EMA.ENABLED",
        ),
    ],
)
def test_a_misspelt_key_names_its_neighbours(tmp_path, train_net, capsys, text, opts, message):
    path = tmp_path / "typo.yaml"
    path.write_text(text)
    code, line, count = tool_says(train_net, capsys, tmp_path / "out", *opts, config=path)
    assert code == 2 and count == 1 and message in line


def aliases(levels):
    """Ten aliases of ten aliases of ...: a file of a few lines that stands for 10 ** levels values."""
    lines = ["A0: &a0 {x: 1}"]
    lines += [f"A{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(10))}}}" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("below", [False, True], ids=["itself", "its base"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (aliases(9), "more than 100000 values"),
        (aliases(9).replace("{k0", "{<<").replace(" k", " <<: *a0, k"), "more than 100000 values|given again"),
        ("MODEL: &m\n  MODEL: *m\n", "line 1 contains itself"),
        ("SEED: " + "[" * 2000 + "]" * 2000, "nested too deeply"),
        ("SEED: 1\nSEED: 2\n", "the key SEED is given again at line 2"),
        (
            "SOLVER:\n  MAX_ITER: 3\nMODEL:\n  MASK_ON: True\nSOLVER:\n  BASE_LR: 0.1\n",
            "the key SOLVER is given again at line 5",
        ),
        ("SOLVER:\n\tMAX_ITER: 3\n", "found character '.t'"),
        ("? [1, 2]\n: 3\n", "a key at line 1 is no text"),
        ("SEED: 2020-99-99\n", "month must be in"),
        ("- 1\n", "holds no config"),
        ("_BASE_: odd.yaml\n", "odd.yaml is based on itself, by way of .*odd.yaml: take"),
        ("_BASE_: none.yaml\n", "none.yaml, which .*odd.yaml names under _BASE_, cannot be read .No such file"),
        ("_BASE_: .\n", "cannot be read .Is a directory"),
        ("_BASE_: 3\n", "has 3 under _BASE_, expected the path of a config"),
        ("_BASE_:\n", "has None under _BASE_"),
    ],
)
def test_what_pyyaml_would_choke_on_or_drop_is_told(tmp_path, text, message, below):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    if below:
        path = tmp_path / "child.yaml"
        path.write_text("_BASE_: odd.yaml\n")
    with pytest.raises(ConfigError, match=message) as error:
        load_config(str(path))
    assert "odd.yaml" in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "latin1.yaml"
    path.write_bytes("OUTPUT_DIR: é\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="byte 12 is no UTF-8 text"):
        load_config(str(path))


def test_aliases_and_merged_keys_have_their_place(tmp_path):
    path = tmp_path / "aliases.yaml"
    path.write_text("MODEL:\n  HALONET: &own\n    NORM: GN\n  TIMM:\n    <<: *own\n    NORM: BN\n")
    cfg = load_config(str(path))
    assert (cfg.MODEL.HALONET.NORM, cfg.MODEL.TIMM.NORM) == ("GN", "BN")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("solver.ims_per_batch", "2", "no config key solver.ims_per_batch: the nearest are SOLVER.IMS_PER_BATCH"),
        ("SEED.X", "2", "no config key SEED.X: the nearest are SEED$"),
        ("SOLVER", "2", r"SOLVER is 2, expected keys below it such as SOLVER.\w+$"),
        (
            "SOLVER.IMS_PER_BATCH",
            "16x",
            "SOLVER.IMS_PER_BATCH is 16x, of type str, expected one of type int such as 16$",
        ),
        ("SOLVER.BASE_LR", "0", "SOLVER.BASE_LR is 0, of type int, expected one of type float such as 0.02$"),
        ("SOLVER.IMS_PER_BATCH", "0", "SOLVER.IMS_PER_BATCH is 0, expected 1 or more"),
        ("SOLVER.MAX_ITER", "-5", "SOLVER.MAX_ITER is -5, expected 1 or more"),
        ("SOLVER.STEPS", "(-3,)", "SOLVER.STEPS is .-3,., expected 0 or more"),
        ("SOLVER.CHECKPOINT_PERIOD", "0", "SOLVER.CHECKPOINT_PERIOD is 0, expected 1 or more"),
        ("SOLVER.WEIGHT_DECAY_BIAS", "-1.0", "SOLVER.WEIGHT_DECAY_BIAS is -1.0, expected 0 or more"),
        ("SOLVER.BASE_LR", "1e999", "SOLVER.BASE_LR is inf, expected 0 or more"),
        ("DATALOADER.NUM_WORKERS", "-1", "DATALOADER.NUM_WORKERS is -1, expected 0 or more"),
        (
            "DATALOADER.SAMPLER_TRAIN",
            "Sampler",
            "DATALOADER.SAMPLER_TRAIN is 'Sampler', expected one of TrainingSampler, ",
        ),
        (
            "DATALOADER.SAMPLER_TRAIN",
            "RepeatFactorTrainingSampler",
            "REPEAT_THRESHOLD 0.0, with which nothing is repeated",
        ),
        ("INPUT.MIN_SIZE_TRAIN", "()", "INPUT.MIN_SIZE_TRAIN is .., expected at least one number"),
        ("INPUT.MASK_FORMAT", "rle", "INPUT.MASK_FORMAT is 'rle', expected one of polygon, bitmask"),
        ("TEST.EVAL_PERIOD", "-1", "TEST.EVAL_PERIOD is -1, expected 0 or more"),
        ("SEED", "99999999999", "SEED is 99999999999, expected less than 2147483648"),
    ],
)
def test_values_out_of_range_are_told_before_the_run(key, value, message):
    with pytest.raises(ConfigError, match=message):
        load_config("mask_rcnn_r50", [key, value])


def test_a_value_of_another_type_in_the_file_is_told_without_the_section_it_stands_for(tmp_path):
    path = tmp_path / "section.yaml"
    path.write_text("SOLVER: [1]\n")
    with pytest.raises(
        ConfigError, match=r"section.yaml cannot be used: SOLVER is \[1\], expected keys below it such as SOLVER.\w+$"
    ):
        load_config(str(path))
