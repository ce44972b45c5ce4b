"""Step 3, DeepLab: networks that learn from pseudo masks, their training and evaluation."""
