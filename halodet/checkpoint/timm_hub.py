"""timm's pretrained weights as ``timm://NAME``, for everything that opens files with Detectron2's PathManager."""

from __future__ import annotations

import difflib
import os
import re
from typing import Any

from halodet.checkpoint.io import read_checkpoint, save_torch, write_file
from halodet.errors import CheckpointError

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import get_cache_dir

PREFIX = "timm://"
_FILES = ("model.safetensors", "pytorch_model.bin")  # names in timm's repositories, in order of preference
_CONNECT_SECONDS = 5.0


class TimmHandler(PathHandler):
    """Path handler of ``timm://NAME``, where NAME is a pretrained timm model such as ``halonet50ts.a1h_in1k``; its tag
    is optional.

    The weights are downloaded from the Hugging Face hub into the hub's cache. The local path is a checkpoint in
    Detectron2's cache: the state dict with timm's names, for Detectron2's matching heuristics, and timm's configuration
    (mean, std, ...) as metadata.
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path[len(PREFIX) :].partition("?")[0]
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise CheckpointError(f"{path} is invalid: expected a timm model such as timm://halonet50ts.a1h_in1k.")
        local = _local_file(name)
        if force or not os.path.isfile(local):
            config = _pretrained_config(name)
            local = _local_file(f"{config.architecture}.{config.tag}" if config.tag else config.architecture)
            if force or not os.path.isfile(local):
                _convert(config, local)
        return local


def _local_file(name: str) -> str:
    return os.path.join(get_cache_dir(), "timm", f"{name}.pth")


def _pretrained_config(name: str) -> Any:
    """Return timm's PretrainedCfg of ``name``."""
    try:
        import timm
        from timm.models import get_pretrained_cfg
    except ImportError as error:
        raise CheckpointError(f"{PREFIX}{name} needs timm ({error}). Fix: pip install 'halodet[timm]'.") from error
    architecture = name.partition(".")[0]
    # Networks with attention come first: they are more likely to be meant.
    names = timm.list_models(module="byoanet", pretrained=True), timm.list_pretrained()
    if not timm.is_model(name):
        near = [match for group in names for match in difflib.get_close_matches(name, group, n=3, cutoff=0.6)]
        near = list(dict.fromkeys(near))[:3] or [n for n in names[0] if "halo" in n]
        raise CheckpointError(f"timm {timm.__version__} has no model {name!r}. Nearest names: {', '.join(near)}.")
    tagged = [n for n in names[1] if n.partition(".")[0] == architecture]
    config = get_pretrained_cfg(name) if name in (architecture, *tagged) else None
    if config is None or not config.has_weights:
        available = f"expected {' or '.join(tagged)}" if tagged else "timm has none for this network"
        raise CheckpointError(f"weights {PREFIX}{name} do not exist: {available}.")
    if not config.hf_hub_id:
        raise CheckpointError(
            f"{PREFIX}{name} is not on the hub. Fix: download {config.url} and set MODEL.WEIGHTS to it."
        )
    return config


def _convert(config: Any, local: str) -> None:
    checkpoint = {
        "model": read_checkpoint(_download(config))["model"],
        "matching_heuristics": True,
        "__author__": "timm",
        "metadata": config.to_dict(remove_source=True) | {"repository": config.hf_hub_id},
    }
    os.makedirs(os.path.dirname(local), exist_ok=True)
    write_file(local, lambda file: save_torch(checkpoint, file))


def _download(config: Any) -> str:
    """Return the file in the hub's cache, downloaded if it is not there."""
    import huggingface_hub
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = config.hf_hub_id.partition("@")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else _FILES

    def download(file: str, *, cached: bool) -> str:
        return huggingface_hub.hf_hub_download(repository, file, revision=revision or None, local_files_only=cached)

    for file in files:
        try:
            return download(file, cached=True)
        except LocalEntryNotFoundError:
            continue
    fix = f"Fix: download {files[0]} of the hub's repository {repository} elsewhere and set MODEL.WEIGHTS to it."
    problem = _connection_problem()
    if problem:
        raise CheckpointError(f"{repository} is not cached and the hub cannot be reached ({problem}). {fix}")
    for file in files:
        try:
            return download(file, cached=False)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # the connection broke
                raise CheckpointError(f"{repository} cannot be downloaded (connection lost). {fix}") from error
        except Exception as error:  # of the connection, the hub's answer, the disk
            reason = (str(error).splitlines() or [""])[0].rstrip(".")
            raise CheckpointError(
                f"{repository} cannot be downloaded ({type(error).__name__}: {reason}). {fix}"
            ) from error
    raise CheckpointError(f"repository {repository} of the hub has no file {' or '.join(files)}.")


def _connection_problem() -> str:
    """Return why the hub cannot be reached; empty if it answers. A download would retry for most of a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT_SECONDS)
    except Exception as error:  # of whichever HTTP client huggingface_hub uses
        return type(error).__name__
    return ""


PathManager.register_handler(TimmHandler(), allow_override=True)  # halodet may be imported again
