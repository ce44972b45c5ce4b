"""The numbered steps: CAMs from images, masks from CAMs, and the scores of CAMs and masks."""
