"""The frozen CLIP that everything stands on."""
