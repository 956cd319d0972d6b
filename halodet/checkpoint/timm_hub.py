"""timm's pretrained weights by name, for everything that opens files with Detectron2's PathManager: ``MODEL.WEIGHTS timm://NAME``."""

from __future__ import annotations

import difflib
import os
import re
from typing import IO, Any

from halodet.checkpoint.io import read_checkpoint, save_torch, write_file
from halodet.errors import CheckpointError

from detectron2.utils.file_io import PathHandler, PathManager
from iopath.common.file_io import get_cache_dir

PREFIX = "timm://"
_FILES = ("model.safetensors", "pytorch_model.bin")  # what a repository of timm holds, the better one first
_REACH_SECONDS = 5.0


class TimmHandler(PathHandler):
    """Answers ``timm://NAME``, NAME being one of timm's pretrained models with or without its tag (``timm://halonet50ts.a1h_in1k``).

    The weights come from the Hugging Face hub into its own cache. Detectron2 gets a file of its own kind, in its own cache: timm's state
    dict under timm's names, to be matched by Detectron2's heuristics, and beside it what is needed to use it (mean, std, ...).
    """

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        name = path[len(PREFIX) :].partition("?")[0]
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise CheckpointError(
                f"{path} is no name of a timm model, expected for example timm://halonet50ts.a1h_in1k."
            )
        local = _local_file(name)
        if force or not os.path.isfile(local):
            config = _pretrained_config(name)
            local = _local_file(f"{config.architecture}.{config.tag}" if config.tag else config.architecture)
            if force or not os.path.isfile(local):
                _convert(config, local)
        return local

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if mode not in ("r", "rb"):
            raise CheckpointError(f"{path} is read-only, and cannot be opened with mode {mode!r}.")
        return open(self._get_local_path(path), mode, buffering)


def _local_file(name: str) -> str:
    return os.path.join(get_cache_dir(), "timm", f"{name}.pth")


def _pretrained_config(name: str) -> Any:
    """timm's PretrainedCfg of ``name``; CheckpointError if timm has no weights of that name."""
    try:
        import timm
        from timm.models import get_pretrained_cfg
    except ImportError as error:
        raise CheckpointError(f"{PREFIX}{name} needs timm ({error}): pip install 'halodet[timm]'.") from error
    architecture = name.partition(".")[0]
    # Of thousands of names those of networks with attention are more likely to be meant.
    near = timm.list_models(module="byoanet", pretrained=True), timm.list_pretrained()
    if not timm.is_model(name):
        found = [match for names in near for match in difflib.get_close_matches(name, names, n=3, cutoff=0.6)]
        found = list(dict.fromkeys(found))[:3] or [n for n in near[0] if "halo" in n]
        raise CheckpointError(
            f"timm {timm.__version__} has no model {name!r}: the nearest names are {', '.join(found)}."
        )
    tagged = [n for n in near[1] if n.partition(".")[0] == architecture]
    config = get_pretrained_cfg(name) if name in (architecture, *tagged) else None
    if config is None or not config.has_weights:
        others = f"its weights are {', '.join(tagged)}" if tagged else "timm has none for this network"
        raise CheckpointError(f"there are no weights {PREFIX}{name}: {others}.")
    if not config.hf_hub_id:
        raise CheckpointError(
            f"{PREFIX}{name} is not on the hub: fetch {config.url} and give the file's path as MODEL.WEIGHTS."
        )
    return config


def _convert(config: Any, local: str) -> None:
    source = _fetch(config)
    checkpoint = {
        "model": read_checkpoint(source)["model"],
        "matching_heuristics": True,
        "__author__": "timm",
        "metadata": config.to_dict(remove_source=True) | {"repository": config.hf_hub_id},
    }
    os.makedirs(os.path.dirname(local), exist_ok=True)
    write_file(local, lambda file: save_torch(checkpoint, file))


def _fetch(config: Any) -> str:
    """The weights' file in the hub's cache, fetched if it is not there."""
    import huggingface_hub
    from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = config.hf_hub_id.partition("@")
    files = (config.hf_hub_filename,) if config.hf_hub_filename else _FILES

    def fetch(file: str, *, cached: bool) -> str:
        return huggingface_hub.hf_hub_download(repository, file, revision=revision or None, local_files_only=cached)

    for file in files:
        try:
            return fetch(file, cached=True)
        except LocalEntryNotFoundError:
            continue
    mend = f"fetch {files[0]} of the hub's repository {repository} elsewhere and give its path as MODEL.WEIGHTS"
    problem = _unreachable()
    if problem:
        raise CheckpointError(f"{repository} is not in the cache and the hub cannot be reached ({problem}): {mend}.")
    for file in files:
        try:
            return fetch(file, cached=False)
        except LocalEntryNotFoundError as error:  # a subclass of the next, but for a connection that broke
            raise CheckpointError(
                f"{repository} could not be fetched, the connection broke: try again, or {mend}."
            ) from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # of the connection, the hub's answer, the disk
            reason = (str(error).splitlines() or [""])[0].rstrip(".")
            raise CheckpointError(
                f"{repository} could not be fetched ({type(error).__name__}: {reason}): {mend}."
            ) from error
    raise CheckpointError(f"the hub's repository {repository} has no file {' or '.join(files)}.")


def _unreachable() -> str:
    """Why the hub cannot be reached, in a few words; empty if it answers. Without this, a download retries for most of a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_REACH_SECONDS)
    except Exception as error:  # of whichever HTTP client huggingface_hub uses
        return type(error).__name__
    return ""


PathManager.register_handler(TimmHandler())
