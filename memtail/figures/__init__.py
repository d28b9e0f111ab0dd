"""The style of figures and pages, and thumbnails of images."""
