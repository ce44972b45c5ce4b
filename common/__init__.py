"""What every room stands on: settings that are declared once, and files that appear whole or not at all."""
