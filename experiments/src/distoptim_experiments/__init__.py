"""The experiments around distoptim: training runs, comparisons, grids, reports."""
