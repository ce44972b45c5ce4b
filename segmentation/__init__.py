"""Shared by all segmentation methods, independent of CLIP: benchmarks, files, masks, training, scores."""
