"""Files of other tools: `export` writes what they read."""
