"""Charts: one description of what is drawn, written as SVG for a page and as PNG for a file."""
