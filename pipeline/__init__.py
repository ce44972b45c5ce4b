"""What the numbered steps do, once: images to CAMs, CAMs to masks, either to scores."""
