"""Step 3, DeepLab: networks that are trained on pseudo masks, with training and evaluation."""
