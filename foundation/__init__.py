"""Base of all packages: settings that are declared once, and atomic file writes."""
