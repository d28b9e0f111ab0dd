"""Style of figures and pages, numbers as text, and thumbnails."""
