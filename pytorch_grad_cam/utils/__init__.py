"""Targets, at the same module path as in the pytorch-grad-cam package."""
