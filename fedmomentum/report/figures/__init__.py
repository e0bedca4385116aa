"""The reports' figures as SVG."""
