"""What `tau` may be instead of an integer."""

from __future__ import annotations

from distoptim.adaptive import AdaComm, HideCommunication
from distoptim.period import Period, PostLocal, Schedule

__all__ = ["AdaComm", "HideCommunication", "Period", "PostLocal", "Schedule"]
