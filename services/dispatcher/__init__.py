"""The dispatcher: looks again and again at what is wanted and what there is, and sends out what is missing."""
