"""The study of the structural-semantic tradeoff: cells, measures, report."""
