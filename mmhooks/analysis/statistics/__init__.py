"""Intervals, resampling, tests and controls; tensors only."""
