"""Trains, evaluates and ships mini-vlm."""
