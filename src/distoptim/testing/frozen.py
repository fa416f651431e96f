"""Imported last by the server from which workers are forked: what is there stays out of collections.

A garbage collection in a worker would go through all of torch, and copy the pages that it shares
with the server: 0.35 s each time, where a worker's own work often takes less.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
