"""Targets under the module path of the pytorch-grad-cam package."""
