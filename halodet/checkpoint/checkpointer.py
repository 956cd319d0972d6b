"""Checkpointer that reads safely and changes a model only if the file is known to fit it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halodet.checkpoint.class_names import classes_metadata, classes_of, show_classes
from halodet.checkpoint.io import LoadedCheckpoint, read_checkpoint, save_torch, summarize, with_query, write_file
from halodet.checkpoint.latest import TAG, latest_checkpoint
from halodet.checkpoint.matching import match
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
    """Detectron2's checkpointer, for which weights that do not fit are an error.

    It loads what :mod:`halodet.checkpoint.matching` understands: checkpoints of halodet and Detectron2, bare backbones,
    timm's classifiers, ResNets. After loading, :attr:`report` says what was loaded; it is logged once, as a table.

    Args:
        model: the model.
        save_dir: folder of the checkpoints.
        min_loaded: minimum share, 0 to 1, of the expected tensors and parameters that a file must provide.
        exact: whether to load only complete checkpoints of this very model. Resuming always does.
        allow_pickle: whether to run code that pickle files hold.
        preloaded: a checkpoint in memory, of :func:`~halodet.checkpoint.io.read_weights` or
            :func:`~halodet.checkpoint.latest.latest_checkpoint`. The first load uses it in place of its file, and
            resuming uses one of ``latest_checkpoint`` in place of a search. It may be given in some ranks only.
        checkpointables: further objects to save and load.

    Raises:
        CheckpointError: on loading; the model is unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        min_loaded: float = 0.95,
        exact: bool = False,
        allow_pickle: bool = False,
        preloaded: LoadedCheckpoint | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.min_loaded, self.exact, self.allow_pickle, self.preloaded = min_loaded, exact, allow_pickle, preloaded
        self.report: LoadReport | None = None

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the latest readable checkpoint of ``save_dir`` if ``resume`` is set and there is one, or else ``path``.

        All ranks resume from the checkpoint that rank 0 finds, and the tag is updated to name it.
        """
        before = self.exact
        self.exact = before or (resume and self._find_latest() is not None)
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self.exact = before

    def save(self, name: str, **kwargs: Any) -> None:
        """Save a checkpoint and update the tag, both atomically.

        The checkpoint has metadata that its tensors do not tell: the preprocessing, the layout of relative position
        tables, and the classes, if the model has an attribute ``halodet_classes``.

        Raises:
            CheckpointWriteError: the file cannot be written; older checkpoints and the tag are unchanged.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        spec = ModelSpec.of(self.model)
        metadata = spec.preprocessing.metadata() if spec.preprocessing else {}
        metadata |= classes_metadata(spec.classes) if spec.classes else {}
        layouts = {tuple(owner.rel_pos_layout().items()) for owner in spec.tables.values()}
        if len(layouts) == 1:
            metadata |= {key: str(size) for key, size in layouts.pop()}
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **parts, **({"metadata": metadata} if metadata else {}), **kwargs}
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info("Saving checkpoint to %s", path)
        write_file(path, lambda file: self.write(data, file))
        self.tag_last_checkpoint(os.path.basename(path))

    def write(self, data: dict[str, Any], file: str) -> None:
        """Write the content of a checkpoint to ``file``."""
        save_torch(data, file)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Update the tag atomically."""
        write_file(os.path.join(self.save_dir, TAG), lambda file: Path(file).write_text(last_filename_basename))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load ``path``, a file or a URL of Detectron2's PathManager, and return the other entries of the file."""
        self._file, self._with_state = path, checkpointables is None
        try:
            return super().load(path, checkpointables)
        except CheckpointError:
            raise
        # Detectron2's errors for a file that does not exist, and PyTorch's for the state of another optimizer.
        except (AssertionError, OSError, RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"MODEL.WEIGHTS={path} cannot be loaded ({' '.join(str(error).split())}).") from error
        finally:
            self._parsed_url_during_load = self.preloaded = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        if self.preloaded and os.path.realpath(self.preloaded.path) == os.path.realpath(filename):
            checkpoint = dict(self.preloaded.checkpoint)
        else:
            checkpoint = read_checkpoint(filename, allow_pickle=self.allow_pickle)
        return with_query(checkpoint, self._parsed_url_during_load.query, self._file)

    def _find_latest(self) -> str | None:
        """Return the name of the checkpoint to resume from, the same in all ranks; None if there is none."""
        name = error = None
        if comm.is_main_process():
            try:
                loaded = self.preloaded
                if loaded is None or not loaded.latest:
                    loaded = latest_checkpoint(self.save_dir, allow_pickle=self.allow_pickle)
                if loaded is not None:
                    self.preloaded, name = loaded, os.path.basename(loaded.path)
                    if name != self._tagged():
                        self.tag_last_checkpoint(name)
            except CheckpointError as caught:  # the other ranks wait
                error = str(caught)
        name, error = comm.all_gather((name, error))[0]
        if error is not None:
            raise CheckpointError(error)
        visible = comm.all_gather(
            name is None or (self._tagged() == name and os.path.isfile(os.path.join(self.save_dir, name)))
        )
        if not all(visible):
            raise CheckpointError(
                f"{name} in {self.save_dir} is visible on {sum(visible)} of {len(visible)} ranks. Fix: OUTPUT_DIR must "
                "be on a shared file system, or copied to each machine."
            )
        return name

    def _tagged(self) -> str:
        return os.path.basename(self.get_checkpoint_file()) if self.has_checkpoint() else ""

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        spec = ModelSpec.of(self.model)
        self.report = check_fit(spec, checkpoint, self._file, min_loaded=self.min_loaded, exact=self.exact)
        # DefaultTrainer has the optimizer in its _trainer, SimpleTrainer itself.
        trainer_state = checkpoint.get("trainer", {})
        optimizer_state = trainer_state.get("_trainer", trainer_state).get("optimizer")
        trainer = self.checkpointables.get("trainer")
        optimizer = getattr(getattr(trainer, "_trainer", trainer), "optimizer", None)
        if self._with_state and optimizer_state and optimizer:
            _check_optimizer(optimizer_state, optimizer, self._file)
        state = checkpoint.pop("model")
        values = {name: source.make() for name, source in self.report.match.sources.items()}
        if self.exact:  # counters of norm layers, which are not required otherwise
            values |= {name: value for name, value in state.items() if name.endswith("num_batches_tracked")}
        self.model.load_state_dict(values, strict=False)
        if comm.is_main_process():
            logger.info("%s", self.report)


def load_weights(
    model: nn.Module,
    weights: str,
    *,
    allow_pickle: bool = False,
    min_loaded: float = 1.0,
    preloaded: LoadedCheckpoint | None = None,
) -> LoadReport:
    """Load a checkpoint into ``model`` and report what was loaded.

    Args:
        model: the model.
        weights: path, or URL of Detectron2's PathManager.
        allow_pickle: whether to run code that pickle files hold.
        min_loaded: minimum share, 0 to 1, of the expected tensors and parameters. With 1 the file must be of this very
            model; otherwise of anything that :class:`Checkpointer` understands.
        preloaded: the file in memory, see :class:`Checkpointer`.

    Raises:
        CheckpointError: the file is not a checkpoint, or provides too little of the model; the model is unchanged.
    """
    if not weights:
        raise CheckpointError("MODEL.WEIGHTS is empty: expected the path of trained weights.")
    options = {"min_loaded": min_loaded, "allow_pickle": allow_pickle, "preloaded": preloaded}
    checkpointer = Checkpointer(model, exact=min_loaded >= 1.0, **options)
    checkpointer.load(weights, checkpointables=[])
    return checkpointer.report


def _check_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer, file: str) -> None:
    """Check that a saved state is of such an optimizer: PyTorch would accept another one and fail at the next step."""

    def layout(groups: list[dict[str, Any]]) -> list[tuple]:
        return [(len(group["params"]), {"momentum", "betas"} & set(group)) for group in groups]

    if layout(state["param_groups"]) != layout(optimizer.param_groups):
        raise CheckpointError(
            f"{file} has the state of another optimizer than {type(optimizer).__name__}, or of other parameter groups. "
            f"Fix: resume with the SOLVER keys of the first start, or start a new run with MODEL.WEIGHTS {file}."
        )


def check_fit(
    spec: ModelSpec, checkpoint: Mapping[str, Any], file: str, *, min_loaded: float, exact: bool
) -> LoadReport:
    """Match ``checkpoint`` with a model without copying anything.

    Args:
        spec: the model.
        checkpoint: as :func:`halodet.checkpoint.io.read_checkpoint` returns it.
        file: name of the file in messages.
        min_loaded: minimum share, 0 to 1, of the expected tensors and parameters.
        exact: whether the file must be a complete checkpoint of this very model, with its classes, its preprocessing
            and its layout of relative position tables.

    Raises:
        CheckpointError: the file provides too little, or has tensors without a counterpart in parts that the model has.
            The message names the first tensors and shapes of both sides.
    """
    report = LoadReport(file, match(spec, checkpoint, exact=exact))
    found = report.match
    if exact:
        enough = len(found.sources) == len(spec.shapes) and not found.surplus.total()
    else:
        used = sum(name.startswith(spec.backbone) for name in found.sources)
        surplus = sum(count for group, count in found.surplus.items() if group in spec.backbone_groups)
        enough = min(report.share, report.tensor_share) >= min_loaded and used >= min_loaded * (used + surplus)
        # Behind a random first convolution the other weights are useless.
        enough = enough and (not used or spec.stem is None or spec.stem in found.sources)
    trained, wanted = ([entry["name"] for entry in classes or ()] for classes in (classes_of(checkpoint), spec.classes))
    if exact and trained and wanted and trained != wanted:
        raise CheckpointError(
            f"{file} was trained on the classes {show_classes(trained)}, but the dataset has {show_classes(wanted)}. "
            "Fix: use a json with these names in the order of their ids, or start a new run with MODEL.WEIGHTS."
        )
    if not enough or not found.sources:
        raise CheckpointError(_misfit(report, checkpoint, min_loaded, exact))
    if found.layouts:
        old, new = (", ".join(f"{key}={size}" for key, size in layout.items()) for layout in found.layouts)
        raise CheckpointError(
            f"{file} was trained with {old}, but the config has {new}. Fix: use the config of the file."
        )
    old, new = preprocessing_of({"metadata": checkpoint.get("metadata")}, "", set()), spec.preprocessing
    if exact and old and new and old != new:
        raise CheckpointError(
            f"{file} was trained with INPUT.FORMAT {old.order}, MODEL.PIXEL_MEAN {list(old.mean)} and MODEL.PIXEL_STD "
            f"{list(old.std)}, but the config has {new.order}, {list(new.mean)} and {list(new.std)}. "
            "Fix: use the config of the file."
        )
    return report


def _misfit(report: LoadReport, checkpoint: Mapping[str, Any], min_loaded: float, exact: bool) -> str:
    found, spec = report.match, report.match.spec
    wanted = list(spec.shapes) if exact else found.expected
    absent = [name for name in wanted if name not in found.sources]
    missing = [f"{name} {spec.shapes[name]}" for name in absent if name not in found.mismatched]
    share, part = (report.model_share, "model") if exact else (report.share, report.part)
    shapes = {name: tuple(value.shape) for name, value in checkpoint["model"].items()}
    facts = [
        f"{len(absent)} of {len(wanted)} tensors of the {part} are missing or have another shape, {percent(share)} of "
        "its parameters match" + ("" if exact else f" (MODEL.WEIGHTS_MIN_LOADED={percent(min_loaded)})")
    ]
    if found.surplus.total():
        groups = summarize([group for group, count in found.surplus.items() if count])
        facts.append(
            f"{found.surplus.total()} tensors of the file have no counterpart in parts that the model has ({groups})"
        )
    if not exact and spec.stem in absent and spec.stem not in found.mismatched:
        facts.append(f"the first convolution {spec.stem} is missing")
    if not found.sources and not found.mismatched:
        facts.append("no name of the file is one of the model")
    for name, (old, new) in list(found.mismatched.items())[:1]:
        facts.append(f"first shape mismatch: {name} is {old} in the file and {new} in the model")
    if missing:
        facts.append(f"missing in the file: {summarize(missing)}")
    if unexpected := [f"{name} {shapes.get(name, '')}".strip() for name in (*found.unexpected, *found.unused)]:
        facts.append(f"unexpected in the file: {summarize(unexpected)}")
    fix = "use the config of the file" if exact else "use a file of this model, or the config of the file"
    if found.sources and not exact:
        fix += ", or lower MODEL.WEIGHTS_MIN_LOADED"
    return f"MODEL.WEIGHTS={report.file} does not fit the config: {'; '.join(facts)}. Fix: {fix}."
