"""What every segmenter shares: benchmarks, images, labels, CAM files, masks, scores. Knows no CLIP."""
