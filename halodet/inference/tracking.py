"""Tracking of objects over the frames of a video."""

from __future__ import annotations

import math

from halodet.errors import HalodetError
from halodet.inference.result import Result

import numpy as np

__all__ = ["LOW_SCORE", "Tracker", "TrackerError"]

_SECOND = 30  # in which trackers measures time
LOW_SCORE = 0.5  # share of the score threshold above which objects continue a track


class TrackerError(HalodetError, RuntimeError):
    """The tracker is not installed."""


class Tracker:
    """ByteTrack of the package trackers: gives the same object the same number in each frame of a video.

    A track starts with the second consecutive frame in which an object is found, so the object has no number in the
    first. A track that is lost continues if its object is found again within a second, or in the next frame where that
    is later. Tracks do not depend on classes.

    Args:
        frame_rate: frames per second.
        score_threshold: minimum score of the objects that start a track. Those below continue tracks that no other
            object continues.

    Raises:
        TrackerError: trackers is not installed.
    """

    def __init__(self, frame_rate: float = 30.0, *, score_threshold: float = 0.5) -> None:
        try:
            import supervision
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise TrackerError(
                f"Tracking needs the package trackers ({error}). Fix: pip install 'halodet[video]'."
            ) from error
        self._detections = supervision.Detections
        self._tracker = ByteTrackTracker(
            frame_rate=frame_rate,
            lost_track_buffer=max(_SECOND, math.ceil(1.5 * _SECOND / frame_rate)),
            track_activation_threshold=score_threshold,
            high_conf_det_threshold=score_threshold,
        )

    def update(self, result: Result, time: float | None = None) -> Result:
        """Return the result of the next frame with track ids, also in the descriptions of panoptic segments.

        Args:
            result: objects of the frame.
            time: time of the frame in seconds, for a variable frame rate; by default frames have equal distances.
        """
        found = self._detections(
            xyxy=result.boxes.astype(np.float64),
            confidence=result.scores.astype(np.float64),
            data={"row": np.arange(len(result))},
        )
        tracked = self._tracker.update(found, timestamp=time)
        ids = np.full(len(result), -1, np.int64)
        if len(tracked):
            ids[tracked.data["row"]] = np.asarray(tracked.tracker_id)
        return result.with_track_ids(ids)
