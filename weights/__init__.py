"""Weights on disk: which files there are, where they lie and how they are checked; knows no pipeline."""
