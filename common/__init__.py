"""Base of all packages: settings that are declared once, and files that are written whole or not at all."""
