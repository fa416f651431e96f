"""What a test needs of torch."""

from __future__ import annotations

import pytest
import torch

# With torch 2.6 FSDP2 asks a CPU "stream" for what it has not.
fsdp = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch needs a GPU"
)
