"""What a test needs of torch, and of what may not be installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

# With torch 2.6 FSDP2 asks a CPU "stream" for what it has not.
fsdp = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch needs a GPU"
)


def trainer(name: str) -> pytest.MarkDecorator:
    """A framework that owns the loop: looked for, not imported, which takes seconds and is the workers' part."""
    return pytest.mark.skipif(
        find_spec(name) is None, reason=f"{name} is not installed: make test-integrations"
    )
