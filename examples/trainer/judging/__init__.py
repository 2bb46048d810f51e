"""How good answers are: scores, thresholds, intervals, gaps between subgroups."""
