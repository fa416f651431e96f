"""How a real worker trains on a batch: one file a method, all in one table in `registry`."""
