"""A checkpointer that reads safely, and copies nothing into a model before the file is known to fit it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from halodet.checkpoint.identify import identify
from halodet.checkpoint.io import read_checkpoint, save_torch, write_file
from halodet.checkpoint.latest import TAG, Found, latest_checkpoint
from halodet.checkpoint.matching import match, some
from halodet.checkpoint.model_spec import ModelSpec
from halodet.checkpoint.preprocessing import preprocessing_of
from halodet.checkpoint.report import LoadReport, percent
from halodet.errors import CheckpointError

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, for which weights that do not arrive are an error instead of lines in the log.

    It takes what :mod:`halodet.checkpoint.matching` understands: checkpoints of this package and of Detectron2, backbones alone, classifiers of
    timm, ResNets. After a load, ``report`` tells what was filled; it is logged once, as a table.

    Args:
        model: to be filled or saved, as for Detectron2's.
        save_dir: folder of checkpoints.
        min_loaded: share, 0 to 1, of what a file should fill, in tensors as in parameters, below which it is refused.
        exact: take only checkpoints of this very model, all of it; what a run resumes from is always taken so.
        allow_pickle: read pickle files that may run code.
        checkpointables: further objects to save and load, as for Detectron2's.

    Raises:
        CheckpointError: on loading; the model is then as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        min_loaded: float = 0.95,
        exact: bool = False,
        allow_pickle: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.min_loaded, self.exact, self.allow_pickle = min_loaded, exact, allow_pickle
        self.report: LoadReport | None = None
        self._found: Found | None = None

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As Detectron2's; a run goes on only from a checkpoint that fills all of the model, the newest that can be read.

        All processes of a run take the one that the first of them finds, and the tag is made to name it.
        """
        before = self.exact
        found = self._find_newest() if resume else None
        self.exact = before or found is not None
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self.exact, self._found = before, None

    def save(self, name: str, **kwargs: Any) -> None:
        """As Detectron2's, with what tensors do not tell beside it: the pixels the model takes, block and halo of its attention.

        The file, and after it the tag, are written under other names first: at any moment each of them is whole.

        Raises:
            CheckpointWriteError: it cannot be written; older checkpoints and the tag are then as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        target = ModelSpec.of(self.model)
        metadata = target.convention.metadata() if target.convention else {}
        windows = set(target.windows.values())
        if len(windows) == 1:
            metadata |= dict(zip(("block_size", "halo_size"), map(str, *windows), strict=True))
        data = {
            "model": self.model.state_dict(),
            **{key: part.state_dict() for key, part in self.checkpointables.items()},
        }
        data |= ({"metadata": metadata} if metadata else {}) | kwargs
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        write_file(path, lambda file: self.write(data, file))
        self.tag_last_checkpoint(os.path.basename(path))

    def write(self, data: dict[str, Any], file: str) -> None:
        """Write what a checkpoint holds to ``file``."""
        save_torch(data, file)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """As Detectron2's; the tag names the old checkpoint or the new one, and is never half written."""
        write_file(os.path.join(self.save_dir, TAG), lambda file: Path(file).write_text(last_filename_basename))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """TensorSource the model from ``path``, a file or a name that Detectron2's PathManager knows; return what else the file holds."""
        self._file, self._with_state = path, checkpointables is None
        try:
            return super().load(path, checkpointables)
        except CheckpointError:
            raise
        # Detectron2's ways to tell of a file that is not there, and PyTorch's of a state for another optimizer.
        except (AssertionError, OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"MODEL.WEIGHTS {path} cannot be loaded ({' '.join(str(error).split())})") from error
        finally:
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        kept = self._found is not None and self._found.path == filename
        checkpoint = self._found.checkpoint if kept else read_checkpoint(filename, allow_pickle=self.allow_pickle)
        return with_query(checkpoint, self._parsed_url_during_load.query, self._file)

    def _find_newest(self) -> str | None:
        """The file to resume from, the same one in all processes; None where there is none."""
        name = error = None
        if comm.is_main_process():
            try:
                self._found = latest_checkpoint(self.save_dir, allow_pickle=self.allow_pickle)
                name = self._found and os.path.basename(self._found.path)
                if name and name != self._tagged():
                    self.tag_last_checkpoint(name)
            except CheckpointError as caught:  # the others wait for what becomes of it
                error = str(caught)
        name, error = comm.all_gather((name, error))[0]
        if error is not None:
            raise CheckpointError(error)
        there = comm.all_gather(
            name is None or (self._tagged() == name and os.path.isfile(os.path.join(self.save_dir, name)))
        )
        if not all(there):
            raise CheckpointError(
                f"{name} in {self.save_dir} is seen by {sum(there)} of the run's {len(there)} processes only: set OUTPUT_DIR to a folder "
                "that all machines share, or copy it to each of them"
            )
        return name

    def _tagged(self) -> str:
        return os.path.basename(self.get_checkpoint_file()) if self.has_checkpoint() else ""

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        self.report = check_fit(
            ModelSpec.of(self.model), checkpoint, self._file, min_loaded=self.min_loaded, exact=self.exact
        )
        saved = checkpoint.get("trainer", {}).get("_trainer", {}).get("optimizer")
        if self._with_state and saved and "trainer" in self.checkpointables:
            _check_optimizer(saved, self.checkpointables["trainer"]._trainer.optimizer, self._file)
        state = checkpoint.pop("model")
        filled = {name: fill.make() for name, fill in self.report.match.fills.items()}
        if self.exact:  # how many batches norms have seen, which is nothing that is missed elsewhere
            filled |= {name: value for name, value in state.items() if name.endswith("num_batches_tracked")}
        self.model.load_state_dict(filled, strict=False)
        if comm.is_main_process():
            logger.info(str(self.report))


def load_weights(model: nn.Module, weights: str, *, allow_pickle: bool = False, min_loaded: float = 1.0) -> LoadReport:
    """TensorSource ``model`` from the checkpoint ``weights``, a path or a name that Detectron2's PathManager knows, and tell what was filled.

    Args:
        model: to be filled.
        weights: of this very model, when all of it must be filled; else of anything that :class:`Checkpointer` understands.
        allow_pickle: read pickle files that may run code.
        min_loaded: share, 0 to 1, of what the file should fill, in tensors as in parameters.

    Raises:
        CheckpointError: the file cannot be read as a checkpoint, or leaves more of the model as it was; nothing is filled then.
    """
    if not weights:
        raise CheckpointError("MODEL.WEIGHTS is empty: give the path of trained weights")
    checkpointer = Checkpointer(model, min_loaded=min_loaded, exact=min_loaded >= 1.0, allow_pickle=allow_pickle)
    checkpointer.load(weights, checkpointables=[])
    return checkpointer.report


def _check_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, file: str) -> None:
    """CheckpointError where a saved state is not that of such an optimizer: PyTorch would take it, and stop at the next step."""
    groups = saved["param_groups"]
    for theirs, ours in zip(groups, optimizer.param_groups, strict=False):
        other = sorted((set(theirs) ^ set(ours)) & {"momentum", "betas"})
        if other or len(theirs["params"]) != len(ours["params"]):
            break
    else:
        if len(groups) == len(optimizer.param_groups):
            return
    raise CheckpointError(
        f"{file} has the state of another optimizer, or of one with other parameter groups, than this config's "
        f"{type(optimizer).__name__}: go on with the SOLVER keys the run was begun with, or begin anew with MODEL.WEIGHTS {file}"
    )


def with_query(checkpoint: dict[str, Any], query: str, file: str) -> dict[str, Any]:
    """The checkpoint, to be matched as the address asks: Detectron2 has ``?matching_heuristics=True``."""
    queries = parse_qs(query)
    if queries.pop("matching_heuristics", ["False"]) == ["True"]:
        checkpoint["matching_heuristics"] = True
    if queries:
        raise CheckpointError(
            f"{file} asks for {', '.join(queries)}, but the only thing to ask for is ?matching_heuristics=True"
        )
    return checkpoint


def check_fit(
    target: ModelSpec, checkpoint: Mapping[str, Any], file: str, *, min_loaded: float, exact: bool
) -> LoadReport:
    """Match ``checkpoint`` with a model, and copy nothing.

    Raises:
        CheckpointError: it fills less of the model than asked for, or brings more than the model has a place for (in the same parts of it);
            the message names the first tensors on both sides, the network that the file looks like, and what differs. With ``exact``
            also: it says that it was trained on other pixels, or with another block or halo, than the model has.
    """
    report = LoadReport(file, match(target, checkpoint, exact=exact))
    found = report.match
    if exact:
        enough = len(found.fills) == len(target.shapes) and not found.foreign.total()
    else:
        used = sum(name.startswith(target.backbone) for name in found.fills)
        foreign = sum(n for part, n in found.foreign.items() if part in target.backbone_groups)
        enough = min(report.share, report.tensor_share) >= min_loaded and used >= min_loaded * (used + foreign)
        # Behind a random first convolution the rest is worth nothing, few parameters as it has.
        enough = enough and (not used or target.stem is None or target.stem in found.fills)
    if not enough or not found.fills:
        raise CheckpointError(_complaint(report, checkpoint, min_loaded, exact))
    if found.window:
        old, new = found.window
        raise CheckpointError(
            f"{file} was trained with attention of block {old[0]} and halo {old[1]}, but the config has {new[0]} and {new[1]}: use the "
            "config it was trained with"
        )
    old, new = preprocessing_of({"metadata": checkpoint.get("metadata")}, "", set()), report.match.target.convention
    if exact and old and new and old != new:
        raise CheckpointError(
            f"{file} was trained with INPUT.FORMAT {old.order} MODEL.PIXEL_MEAN {list(old.mean)} MODEL.PIXEL_STD {list(old.std)}, but the "
            f"config has {new.order}, {list(new.mean)} and {list(new.std)}: use the config it was trained with"
        )
    return report


def _complaint(report: LoadReport, checkpoint: Mapping[str, Any], min_loaded: float, exact: bool) -> str:
    found = report.match
    wanted = list(found.target.shapes) if exact else found.expected
    unfilled = [name for name in wanted if name not in found.fills]
    missing = [name for name in unfilled if name not in found.mismatched]
    part = "model" if exact or found.whole or not found.target.detector else "backbone"
    said = [
        f"{len(unfilled)} of the {part}'s {len(wanted)} tensors are missing or of another shape, "
        f"{percent(report.model_share if exact else report.share)} of its parameters are filled"
    ]
    if not exact:
        said[0] += f" and MODEL.WEIGHTS_MIN_LOADED asks for {percent(min_loaded)} of both"
    if found.foreign.total():
        parts = some(group for group, count in found.foreign.items() if count)
        said.append(
            f"{found.foreign.total()} tensors of the file belong to parts that the model has ({parts}), and have no place there"
        )
    if not exact and found.target.stem in missing:
        said.append("the first convolution is one of the missing")
    if not found.fills and not found.mismatched:
        said.append("no tensor of the file has a name of the model's")
    looks = identify({name: tuple(value.shape) for name, value in checkpoint["model"].items()})
    own = identify(found.target.shapes)
    if looks and looks != own:
        said.append(f"the file looks like {looks}" + (f", the model is {own}" if own else ""))
    for name, (file, model) in list(found.mismatched.items())[:1]:
        said.append(f"the first of another shape is {name}, {file} in the file and {model} in the model")
    if missing:
        said.append(f"missing in the file: {some(missing)}")
    if found.unexpected or found.not_used:
        said.append(f"unexpected in the file: {some([*found.unexpected, *found.not_used])}")
    mend = "use the config it was trained with" if exact else "use a file of this model, or the config of the file's"
    if found.fills and not exact:
        mend += ", or, where this is meant, a lower MODEL.WEIGHTS_MIN_LOADED"
    return f"MODEL.WEIGHTS {report.file} does not fit the config: {'; '.join(said)}: {mend}"
