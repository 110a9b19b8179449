"""Intervals, resampling, hypothesis tests and random controls, on tensors only."""
