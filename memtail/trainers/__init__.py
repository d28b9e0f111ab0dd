"""Trainers: each turns subsets, seeds and a device into outcomes. `images` is the built-in trainer."""
