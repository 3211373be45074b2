"""Evaluation: metrics, tasks and comparisons at equal backbones."""
